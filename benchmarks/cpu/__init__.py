"""Time, memory and error of quantized diffusion transformers on the CPU: our systems compared with others.

    python -m benchmarks.cpu --model dit:4 --rounds 15 --markdown benchmarks/results/cpu.md

How it measures:

* Every system runs in its own process. So the settings of one system do not affect another, a system that cannot be
  made loses only its own row, and memory is that of one system. Every round calls each system once, so a machine that
  slows down for a while slows all of them. One unmeasured call precedes each measured call.
* ``ms`` is the median over rounds, with quartiles. ``x`` is the median over rounds of the time of eager fp32 over the
  time of the system in the same round.
* ``of int8`` is the share of the int8 roofline: the time that the model's linear layers alone would take at the rate of
  the best integer product of their shapes, over the time of the call. That rate is measured in every round too.
* ``SQNR`` is that of the output against float. Weights are random, so it says little about a trained model. ``digits``
  is the same on the trained model of examples/digits, calibrated on its calibration calls and averaged over the calls
  of an unseen trajectory.
* ``resident`` and ``peak`` are the memory of the process after the calls and at its highest, minus its memory after the
  imports. Systems that can be stored, ours and OpenVINO's, are made in another process and loaded from disk, as in
  deployment; the others are made in the measured process.

Other quantizers are optional extras, ``pip install '.[bench,bench-more]'``. Those that are not installed are left out,
and a line says so.
"""

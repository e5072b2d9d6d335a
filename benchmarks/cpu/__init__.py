"""Time, memory and error of quantized diffusion transformers on the processor, ours and others' side by side.

    python -m benchmarks.cpu --model dit:4 --rounds 15 --markdown benchmarks/results/cpu.md

How it measures:

* Every system runs in a process of its own, so that no system's settings reach another, a system that cannot be made
  only costs its own row, and memory is that of one system. They are called by turns: a machine that slows down for a
  while slows all of them. Before each measured call stands one that is not measured.
* ``ms`` is the median over rounds, with quartiles. ``x`` is the median over rounds of eager fp32's time over the
  system's in the same round.
* ``of int8`` is the share of the int8 roofline: the time that the model's linear layers alone would take at the rate of
  the best integer product of their shapes, over the time of the call. That rate is measured in every round too.
* ``SQNR`` is that of the output against float. Weights are random, so it says little; ``digits`` is the same on the
  trained model of examples/digits, calibrated on its calibration calls, mean over the calls of an unseen trajectory.
* ``resident`` and ``peak`` are the process's memory after the calls and at its highest, over what it holds after the
  imports. Systems that can be stored, ours and OpenVINO's, are made in another process and loaded from disk, as they
  would be where they are used; the others are made in the process itself.

Peers are an optional extra, ``pip install '.[bench]'``; what is not installed is left out with a line that says so.
"""

"""Time, memory and error of quantized diffusion transformers on an NVIDIA GPU: our systems compared with others.

    python -m benchmarks.gpu --model dit,flux:4+8 --batch 2,16 --markdown benchmarks/results/gpu.md

How it measures:

* Everything runs in one process. In every round, each system is called once unmeasured and then repeatedly between two
  CUDA events, for at least 20 ms or 50 calls. A device that slows down for a while slows all systems. ``ms`` is the
  median over rounds, with quartiles; ``x`` is the median over rounds of the time of compiled bf16 over the time of the
  system in the same round. Systems that do not fit in memory together are measured in groups, each with the reference.
* Everything is checked before it is timed. A product is compared with float64, element by element, on new random
  inputs; its output memory is filled with NaN or with large numbers first. For a whole model, the last output is
  overwritten with NaN; the next output must be finite and near that of the float model. Failures are listed with the
  reason and have no figures.
* ``SQNR`` is that of the output against float32 arithmetic on the same bfloat16 weights, or against eager bf16 if
  float32 does not fit in memory; the table says which. Weights are random, so it says little about pictures.
* ``weights`` are the bytes that the device holds for the model before its first call; ``peak`` is the most that it
  holds in a call, measured in the second call, in which CUDA graphs are recorded.
* Modes: ``max-autotune`` is torch's mode of that name, with CUDA graphs; ``compiled`` is torch's default mode;
  ``CUDA graph`` is the uncompiled model, recorded once and replayed. Every compiled function has its own code object,
  so that guards of other functions cost no time.
* Products are recorded in CUDA graphs and replayed with cold caches: a buffer larger than the caches is cleared before
  each product. Shares are relative to the device's peak: the rate of the fastest product of large squares with the same
  kind of number, measured in the same run.

Without a GPU, or with ``--check``, only the checks run, on small models and shapes, and nothing is timed. Without a
GPU, our kernels run in Triton's interpreter.
"""

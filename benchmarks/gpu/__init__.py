"""Time, memory and error of quantized diffusion transformers on an NVIDIA GPU, ours and others' side by side.

    python -m benchmarks.gpu --model dit,flux:4+8 --batch 2,16 --markdown benchmarks/results/gpu.md

How it measures:

* Everything runs in one process and by turns: in every round each system is called once without being measured and then
  between two CUDA events, so often that 20 ms go by. A device that slows down for a while slows all of them. ``ms`` is
  the median over rounds, with quartiles; ``x`` is the median over rounds of compiled bf16's time over the system's in
  the same round. Systems that do not fit in memory together are measured in groups, each beside the reference.
* Nothing is timed before it is right. A product is compared with float64, element by element, on new random inputs, and
  what it writes to is filled with NaN or with large numbers first. Of a whole model the last output is overwritten with
  NaN, the next has to be finite and near the float model's. What fails is listed with the reason, and has no figure.
* ``SQNR`` is that of the output against float32 arithmetic on the same bfloat16 weights, or against eager bf16 where
  float32 does not fit; the table says which. Weights are random, so it says little about pictures.
* ``weights`` are the bytes that the device holds for the model before its first call; ``peak`` is the most that it
  holds in a call, measured in the second one, in which CUDA graphs are recorded.
* Modes: ``max-autotune`` is torch's, with CUDA graphs; ``compiled`` is torch's usual one; ``CUDA graph`` is the model
  as it is, recorded once and replayed. Every compiled function has code of its own, so that guards of others cost
  nothing.
* Products are recorded in CUDA graphs and replayed with cold caches, since a buffer larger than they are is cleared
  before each. Shares are of the device's peak: that of the fastest of its products of large squares of that kind of
  number, measured in the same run.

Without a GPU, or with ``--check``, only the checks run, on small models and shapes, with our kernels in Triton's
interpreter where there is no GPU, and nothing is timed.
"""

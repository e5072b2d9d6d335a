// Threads take units of work when they are free: cores are rarely equally fast, and with equal shares the slowest core
// would decide the time.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace fxquant {

// Calls `worker(take)` in each of torch's threads. A worker calls `take(f)` once. f is called for units 0 to units - 1:
// each unit in one worker, in rising order within a worker, `least` or more units at a time.
template <class Worker>
void share_out(int64_t units, int64_t least, const Worker& worker) {
  const int64_t threads = std::clamp<int64_t>(units / std::max<int64_t>(least, 1), 1, at::get_num_threads());
  // Few turns, so that their cost is negligible; but enough turns that the last ones are short.
  const int64_t step = std::max(least, units / (threads * 16));
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    worker([&](const auto& function) {
      for (int64_t begin = next.fetch_add(step); begin < units; begin = next.fetch_add(step))
        for (int64_t unit = begin; unit < std::min(begin + step, units); ++unit) function(unit);
    });
  });
}

}  // namespace fxquant

// A team of threads that goes through one call together: barriers inside, items handed out one by one.
#pragma once

#include <cstdint>

struct qlm_team {
  virtual ~qlm_team() = default;
  virtual int threads() const = 0;

  // Run `work(context, thread)` on every thread, 0 <= thread < threads(); returns when all are done. One call at a time
  // (callers queue). An exception must not leave `work`.
  virtual void run(void (*work)(void *context, int thread), void *context) = 0;

  // Inside `run` only, called by every thread: none goes on before all have come. Resets `next`.
  virtual void barrier() = 0;

  // Inside `run` only: the numbers 0, 1, 2, ... one after the other to whoever asks, from 0 again after each barrier.
  // Which thread gets which number must not change any result.
  virtual int64_t next() = 0;

  // `work(item)` for 0 <= item < items, spread over the threads of a running call; no barrier at the end.
  template <typename F> void each(int64_t items, F &&work) {
    for (int64_t item = next(); item < items; item = next()) work(item);
  }

  template <typename F> void run(F &&work) {
    run([](void *context, int thread) { (*static_cast<F *>(context))(thread); }, &work);
  }
};

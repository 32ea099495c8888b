// The way of selected elements of many tensors into one compact buffer, and back.
#pragma once

#include <cstdint>

// Elements ahead that are fetched from memory while the present one is moved.
constexpr int64_t AHEAD = 128;

// Part of a tensor's selected elements, those from `start` to before `stop` of the compact buffer.
struct Job {
  int64_t tensor, start, stop;
};

// compact[j] <- own[index[j]] for each job, or the other way round; `addresses` are the tensors'.
template <typename T, typename Index, bool SCATTER>
void move(const int64_t* addresses, const Job* jobs, int64_t count, const Index* index, T* compact, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t k = 0; k < count; k++) {
    T* own = reinterpret_cast<T*>(addresses[jobs[k].tensor]);
    const int64_t stop = jobs[k].stop;
    for (int64_t j = jobs[k].start; j < stop; j++) {
      if (j + AHEAD < stop) __builtin_prefetch(own + index[j + AHEAD], SCATTER);
      if (SCATTER) own[index[j]] = compact[j];
      else compact[j] = own[index[j]];
    }
  }
}

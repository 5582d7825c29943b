// Repeat-consumption bonus of the items seen in a sliding window of events; the maths is in
// findrec/ops/repeat_bonus.py.
//
// A unit of work is a run of target positions of one row. It walks the events from the start of the first position's
// window and keeps per candidate item the counters that the features need, so no buffer of size positions x items x
// features is stored; the backward pass repeats the walk. One thread sums each position in a fixed number of lanes:
// results depend neither on the number of threads nor on memory alignment.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

// The tensors of a call, contiguous; unused ones are null. `tables` [4, stride] has an entry for each integer up to
// `window`, padded to whole lanes: log1p of a count; then, of a lag, its scaled log1p, its exponential, and 1.
extern "C" struct RepeatBonusArgs {
  int64_t tokens, events, candidates, window, recent, stride, threads;
  const int64_t *rank, *row, *step;  // [rows, events], [tokens] ascending, [tokens] ascending within a row
  const float *weights, *tables;     // [tokens, 5]
  float* bonus;                      // [tokens, candidates]
  uint8_t* seen;                     // [tokens, candidates]
  const float* dbonus;               // [tokens, candidates]
  float* dweights;                   // [tokens, 5]
};

namespace {

constexpr int kFeatures = 5;
constexpr int kLanes = 8;               // partial sums of the backward pass
constexpr int64_t kUnit = 256;          // positions of a unit: more leave threads idle, fewer repeat more of the walk
constexpr int32_t kNever = -(1 << 30);  // far enough back to be outside of any window

inline int64_t whole_lanes(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

// Counters of each candidate item after an event. Arrays are padded to whole lanes with items never seen.
struct Walk {
  const RepeatBonusArgs& a;
  std::vector<int32_t> last, count, recent;
  std::vector<float> log_count, log_recent;
  const int64_t* rank = nullptr;
  int64_t begin = 0, next = 0;

  explicit Walk(const RepeatBonusArgs& args) : a(args) {
    const int64_t padded = whole_lanes(a.candidates);
    for (auto* x : {&last, &count, &recent}) x->resize(padded);
    for (auto* x : {&log_count, &log_recent}) x->resize(padded);
  }

  void start(int64_t token) {
    rank = a.rank + a.row[token] * a.events;
    begin = next = std::max<int64_t>(0, a.step[token] - a.window + 1);
    std::fill(last.begin(), last.end(), kNever);
    for (auto* x : {&count, &recent}) std::fill(x->begin(), x->end(), 0);
    for (auto* x : {&log_count, &log_recent}) std::fill(x->begin(), x->end(), 0.0f);
  }

  // Add the events up to `step` and remove those that leave a window.
  void advance(int64_t step) {
    for (; next <= step; ++next) {
      if (const int64_t n = rank[next]; n < a.candidates) {
        last[n] = static_cast<int32_t>(next);
        add(count, log_count, n, 1);
        add(recent, log_recent, n, 1);
      }
      forget(count, log_count, next - a.window);
      forget(recent, log_recent, next - a.recent);
    }
  }

  void add(std::vector<int32_t>& number, std::vector<float>& log, int64_t n, int change) {
    log[n] = a.tables[number[n] += change];
  }

  void forget(std::vector<int32_t>& number, std::vector<float>& log, int64_t event) {
    if (event >= begin && rank[event] < a.candidates) add(number, log, rank[event], -1);
  }
};

// Call `visit(walk, token)` for the positions of each unit, in order.
template <typename Visit>
void for_each_token(const RepeatBonusArgs& a, Visit visit) {
  std::vector<int64_t> border;
  for (int64_t t = 0; t < a.tokens; ++t)
    if (t == 0 || a.row[t] != a.row[t - 1] || t - border.back() == kUnit) border.push_back(t);
  const int64_t units = static_cast<int64_t>(border.size());
  border.push_back(a.tokens);
#pragma omp parallel num_threads(static_cast<int>(a.threads))
  {
    Walk walk(a);
    std::vector<float> buffer(whole_lanes(a.candidates) + whole_lanes(a.window + 1));
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < units; ++unit) {
      walk.start(border[unit]);
      for (int64_t t = border[unit]; t < border[unit + 1]; ++t) {
        walk.advance(a.step[t]);
        visit(walk, t, buffer.data());
      }
    }
  }
}

void forward_token(const RepeatBonusArgs& a, const Walk& walk, int64_t t, float* __restrict of_lag) {
  const int32_t window = static_cast<int32_t>(a.window), step = static_cast<int32_t>(a.step[t]);
  const float *w = a.weights + t * kFeatures, *log_lag = a.tables + a.stride, *fading = log_lag + a.stride;
  const float w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3], w4 = w[4];
  const int64_t candidates = a.candidates;  // a copy, as bytes may alias anything
  // All terms that depend on the lag alone are combined into one table: one look-up per item.
  const int64_t lags = std::min(a.step[t] - walk.begin + 1, a.window);
  for (int64_t k = 0; k < lags; ++k) of_lag[k] = w0 + w2 * log_lag[k] + w4 * fading[k];
  of_lag[window] = 0.0f;
  const int32_t* last = walk.last.data();
  const float *log_count = walk.log_count.data(), *log_recent = walk.log_recent.data();
  float* __restrict bonus = a.bonus + t * a.candidates;
  uint8_t* __restrict seen = a.seen + t * a.candidates;
  for (int64_t n = 0; n < candidates; ++n) {
    const int32_t lag = step - last[n];
    bonus[n] = of_lag[lag < window ? lag : window];
  }
  for (int64_t n = 0; n < candidates; ++n) bonus[n] += w1 * log_count[n] + w3 * log_recent[n];
  for (int64_t n = 0; n < candidates; ++n) seen[n] = step - last[n] < window;
}

// out[j] = sum of x y_j, in a fixed order; `size` is made up to whole lanes by zeros in x.
template <int kSums>
void dots(float* out, const float* x, const float* const (&y)[kSums], int64_t size) {
  typedef float V __attribute__((vector_size(kLanes * sizeof(float))));
  V sum[kSums] = {};
  for (int64_t n = 0; n < size; n += kLanes) {
    V left, right;
    std::memcpy(&left, x + n, sizeof(V));
    for (int j = 0; j < kSums; ++j) {
      std::memcpy(&right, y[j] + n, sizeof(V));
      sum[j] += left * right;
    }
  }
  for (int j = 0; j < kSums; ++j) {
    out[j] = 0.0f;
    for (int k = 0; k < kLanes; ++k) out[j] += sum[j][k];
  }
}

void backward_token(const RepeatBonusArgs& a, const Walk& walk, int64_t t, float* buffer) {
  const int32_t window = static_cast<int32_t>(a.window), step = static_cast<int32_t>(a.step[t]);
  const float *log_lag = a.tables + a.stride, *fading = log_lag + a.stride, *one = fading + a.stride;
  const int64_t padded = static_cast<int64_t>(walk.last.size());
  float *g = buffer, *of_lag = buffer + padded;
  std::memcpy(g, a.dbonus + t * a.candidates, sizeof(float) * a.candidates);
  std::fill(g + a.candidates, g + padded, 0.0f);
  // No two items share their latest event, so the gradient by lag needs no accumulation.
  const int64_t lags = whole_lanes(std::min(a.step[t] - walk.begin + 1, a.window));
  std::fill(of_lag, of_lag + lags, 0.0f);
  const int32_t* last = walk.last.data();
  for (int64_t n = 0; n < a.candidates; ++n) {
    const int32_t lag = step - last[n];
    of_lag[lag < window ? lag : window] = g[n];
  }
  of_lag[window] = 0.0f;  // items not seen
  float by_lag[3], by_item[2];
  dots<2>(by_item, g, {walk.log_count.data(), walk.log_recent.data()}, padded);
  dots<3>(by_lag, of_lag, {one, log_lag, fading}, lags);
  const float dw[kFeatures] = {by_lag[0], by_item[0], by_lag[1], by_item[1], by_lag[2]};
  std::memcpy(a.dweights + t * kFeatures, dw, sizeof(dw));
}

}  // namespace

extern "C" {
void repeat_bonus_forward(const RepeatBonusArgs* a) {
  for_each_token(*a, [a](const Walk& walk, int64_t t, float* buffer) { forward_token(*a, walk, t, buffer); });
}
void repeat_bonus_backward(const RepeatBonusArgs* a) {
  for_each_token(*a, [a](const Walk& walk, int64_t t, float* buffer) { backward_token(*a, walk, t, buffer); });
}
}

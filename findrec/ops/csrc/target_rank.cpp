// Counts the items that score above each target in one pass over the catalogue; the maths is in
// findrec/ops/ranking/target_rank.py.
//
// A tile of items is packed once and scored for all users while it is in the L1 cache; scores are compared in blocks
// that fit the registers, so no matrix of scores is stored. The screen's numbers are 16-bit
// integers, whose sums of products are exact, or float32. Undecided pairs are scored again immediately, in
// float64 from the stored float32 vectors. Threads divide the tiles and counts are integers, so results do not
// depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "screen.h"

// Rows are users that have a case; cases are grouped by row. Unused pointers are null.
extern "C" struct RankArgs {
  int64_t rows, items, width, cases, threads;
  int64_t item_stride;         // floats from one item to the next
  int64_t plain;               // 1: no screen, every pair in float64
  const float *users, *item;   // [rows, width] dense, [items, item_stride]
  const int64_t* start;        // [rows + 1] where each row's cases begin
  const double* target;        // [cases] score of the target, never NaN
  const int64_t *since, *time;  // [items], [cases]: an item counts where since <= time
  int64_t *greater, *equal;    // [cases], added to
  int64_t* doubtful;           // [1], added to: pairs that were scored again
};

namespace {

using namespace screen;

constexpr int64_t kTileBytes = 16 << 10;   // packed items of a tile: half of a small L1 cache
constexpr int64_t kChunkBytes = 1 << 20;   // packed users that are traversed again for each tile
constexpr int kFew = 4;  // up to so many undecided items of a panel are scored one by one, more of them together

// The score itself: products of float32 numbers are exact in float64, their sum has this order.
double exact_score(const float* x, const float* y, int64_t width) {
  double sum = 0;
  for (int64_t k = 0; k < width; ++k) sum += static_cast<double>(x[k]) * y[k];
  return sum;
}

// The same in any order, within gamma(width, 2^-53) |x| |y| of the exact sum, as is the score.
double near_score(const float* x, const float* y, int64_t width) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < width; ++k) sum += static_cast<double>(x[k]) * y[k];
  return sum;
}

struct Tally {
  std::vector<int64_t> greater, equal;
  int64_t doubtful = 0;
};

template <class Kind>
class Walk {
 public:
  using Sum = typename Kind::Sum;

  Walk(const RankArgs& args, int64_t first, int64_t last)
      : a(args), first_(first), rows_(last - first), steps_((args.width + Kind::kDeep - 1) / Kind::kDeep) {
    panels_ = std::clamp<int64_t>(kTileBytes / (steps_ * kItems * 4), 1, 8);
    const int64_t groups = (rows_ + kRows - 1) / kRows;
    users_.assign(groups * steps_ * kRows, 0);
    of_.resize(rows_);
#pragma omp parallel for num_threads(static_cast<int>(a.threads)) schedule(static)
    for (int64_t r = 0; r < rows_; ++r) {
      const float* x = a.users + (first_ + r) * a.width;
      of_[r] = Kind::user(x, a.width);
      if (!tame(of_[r].norm)) continue;  // its pairs are all in doubt
      Kind::pack(x, a.width, of_[r].unit, &users_[r / kRows * steps_ * kRows + r % kRows], kRows);
    }
  }

  int64_t tile_items() const { return panels_ * kItems; }

  // Buffers of one thread, reused for each tile.
  struct Space {
    std::vector<uint32_t> packed;
    std::vector<double> norm;      // of each item of the tile
    std::vector<int64_t> latest;   // of each panel
    std::vector<float> turned;     // [width, kItems], a panel for `exact_panel`
    std::vector<Sum> low, high;    // of each case of a group
    Sum lowest[kRows];             // of each row of it
    alignas(64) Sum sums[kRows * kItems];
    int64_t turned_item = -1;
  };

  void tile(int64_t begin, Space& s, Tally& tally) const {
    const int64_t end = std::min(a.items, begin + tile_items());
    const Tile tile = pack(begin, end, s);
    const int64_t panel_words = steps_ * kItems;
    for (int64_t row = 0; row < rows_; row += kRows) {
      const int64_t stop = std::min<int64_t>(rows_, row + kRows);
      limits(tile, row, stop, s);
      const int64_t first_case = a.start[first_ + row];
      for (int64_t item = begin, p = 0; item < end; item += kItems, ++p) {
        if (tile.screened) {
          multiply<Kind>(&users_[row * steps_], &s.packed[p * panel_words], steps_, s.sums);
        }
        const int64_t held = std::min<int64_t>(kItems, end - item);
        const uint32_t valid = held == 32 ? ~0u : (1u << held) - 1;
        for (int64_t r = row; r < stop; ++r) {
          const Sum* sums = s.sums + (r - row) * kItems;
          if (s.lowest[r - row] != Kind::kAll && !above<Kind>(sums, s.lowest[r - row])) continue;
          for (int64_t c = a.start[first_ + r]; c < a.start[first_ + r + 1]; ++c) {
            const Sum low = s.low[c - first_case], high = s.high[c - first_case];
            uint32_t open = valid, sure = 0;
            if (low != Kind::kAll) {
              open &= above<Kind>(sums, low);
              if (!open) continue;
              sure = above<Kind>(sums, high) & valid;
            }
            if (a.since != nullptr && s.latest[p] > a.time[c]) {
              const uint32_t there = present(item, held, a.time[c]);
              open &= there, sure &= there;
            }
            tally.greater[c] += __builtin_popcount(sure);
            if (open != sure) decide(open & ~sure, r, item, held, begin, c, s, tally);
          }
        }
      }
    }
  }

 private:
  const RankArgs& a;
  int64_t first_, rows_, steps_, panels_;
  std::vector<uint32_t> users_;  // [groups, steps, kRows]
  std::vector<User> of_;

  Tile pack(int64_t begin, int64_t end, Space& s) const {
    Sizes most{0, 0};
    bool good = !a.plain;
    for (int64_t i = begin; i < end; ++i) {
      const Sizes here = measure(a.item + i * a.item_stride, a.width);
      s.norm[i - begin] = here.norm;
      good = good && here.norm < kLarge;  // false for NaN
      most = {std::max(most.norm, here.norm), std::max(most.largest, here.largest)};
    }
    s.turned_item = -1;
    if (a.since != nullptr) {
      for (int64_t i = begin, p = 0; i < end; i += kItems, ++p) {
        s.latest[p] = *std::max_element(a.since + i, a.since + std::min(end, i + kItems));
      }
    }
    if (!good || !tame(most.norm)) return {0, 0, 0, false};
    const Tile tile = Kind::tile(most, a.width);
    const int64_t panel_words = steps_ * kItems;
    if (end - begin < tile_items()) std::fill(s.packed.begin(), s.packed.end(), 0);
    for (int64_t i = 0; i < end - begin; ++i) {
      uint32_t* out = &s.packed[i / kItems * panel_words + i % kItems];
      Kind::pack(a.item + (begin + i) * a.item_stride, a.width, tile.unit, out, kItems);
    }
    return tile;
  }

  // Sums up to `low` are certainly below the target, those above `high` certainly above it.
  void limits(const Tile& tile, int64_t row, int64_t stop, Space& s) const {
    const int64_t first_case = a.start[first_ + row];
    s.low.resize(a.start[first_ + stop] - first_case);
    s.high.resize(s.low.size());
    for (int64_t r = row; r < stop; ++r) {
      const User& u = of_[r];
      const bool screened = tile.screened && tame(u.norm);
      const double bound = (u.norm_part * tile.norm + u.rest_part * tile.rest) * (1 + 1e-9);
      const double scale = u.scale * tile.scale;
      s.lowest[r - row] = Kind::kNone;
      for (int64_t c = a.start[first_ + r]; c < a.start[first_ + r + 1]; ++c) {
        s.low[c - first_case] = screened ? Kind::lower((a.target[c] - bound) * scale) : Kind::kAll;
        s.high[c - first_case] = screened ? Kind::upper((a.target[c] + bound) * scale) : Kind::kNone;
        s.lowest[r - row] = std::min(s.lowest[r - row], s.low[c - first_case]);
      }
    }
  }

  uint32_t present(int64_t item, int64_t held, int64_t time) const {
    uint32_t mask = 0;
    for (int64_t j = 0; j < held; ++j) mask |= static_cast<uint32_t>(a.since[item + j] <= time) << j;
    return mask;
  }

  void decide(uint32_t open, int64_t r, int64_t item, int64_t held, int64_t begin, int64_t c, Space& s,
              Tally& tally) const {
    const float* x = a.users + (first_ + r) * a.width;
    const double target = a.target[c];
    tally.doubtful += __builtin_popcount(open);
    if (__builtin_popcount(open) > kFew) {
      double score[kItems];
      exact_panel(x, item, held, s, score);
      for (int j = 0; j < kItems; ++j) {
        if (!(open >> j & 1)) continue;
        tally.greater[c] += score[j] > target;
        tally.equal[c] += score[j] == target;
      }
      return;
    }
    for (; open; open &= open - 1) {
      const int64_t i = item + __builtin_ctz(open);
      const float* y = a.item + i * a.item_stride;
      const double near = near_score(x, y, a.width);
      const double bound = 2 * gamma(a.width, 0x1p-53) * of_[r].norm * s.norm[i - begin];
      if (near > target + bound * (1 + 1e-9)) {
        ++tally.greater[c];
      } else if (!(near < target - bound * (1 + 1e-9))) {  // a tie, nearly one, or no number
        const double score = exact_score(x, y, a.width);
        tally.greater[c] += score > target;
        tally.equal[c] += score == target;
      }
    }
  }

  // `exact_score` of all items of a panel, each in its own lane.
  void exact_panel(const float* x, int64_t item, int64_t held, Space& s, double* score) const {
    if (s.turned_item != item) {
      s.turned.assign(a.width * kItems, 0.0f);
      for (int64_t j = 0; j < held; ++j) {
        const float* y = a.item + (item + j) * a.item_stride;
        for (int64_t k = 0; k < a.width; ++k) s.turned[k * kItems + j] = y[k];
      }
      s.turned_item = item;
    }
    double sum[kItems] = {};
    const float* y = s.turned.data();
    for (int64_t k = 0; k < a.width; ++k, y += kItems) {
      const double v = x[k];
      for (int j = 0; j < kItems; ++j) sum[j] += v * y[j];
    }
    std::memcpy(score, sum, sizeof sum);
  }
};

template <class Kind>
void count(const RankArgs& a) {
  const int64_t row_bytes = (a.width + Kind::kDeep - 1) / Kind::kDeep * 4;
  const int64_t chunk = std::max<int64_t>(1, kChunkBytes / std::max<int64_t>(1, row_bytes) / kRows) * kRows;
  for (int64_t first = 0; first < a.rows; first += chunk) {
    const Walk<Kind> walk(a, first, std::min(a.rows, first + chunk));
    const int64_t per_tile = walk.tile_items(), tiles = (a.items + per_tile - 1) / per_tile;
#pragma omp parallel num_threads(static_cast<int>(a.threads))
    {
      typename Walk<Kind>::Space space;
      space.packed.assign(per_tile * row_bytes / 4, 0);
      space.norm.resize(per_tile);
      space.latest.resize(per_tile / kItems);
      Tally tally;
      tally.greater.assign(a.cases, 0);
      tally.equal.assign(a.cases, 0);
#pragma omp for schedule(dynamic, 4)
      for (int64_t t = 0; t < tiles; ++t) walk.tile(t * per_tile, space, tally);
#pragma omp critical(findrec_target_rank)
      {
        for (int64_t c = 0; c < a.cases; ++c) a.greater[c] += tally.greater[c];
        for (int64_t c = 0; c < a.cases; ++c) a.equal[c] += tally.equal[c];
        *a.doubtful += tally.doubtful;
      }
    }
  }
}

}  // namespace

extern "C" void count_int16(const RankArgs* args) { count<Int16>(*args); }

extern "C" void count_float32(const RankArgs* args) { count<Float32>(*args); }

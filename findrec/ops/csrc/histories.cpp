// Copies histories from memory-mapped shards into padded batches; see findrec/datasets/folder/packed.py and findrec/datasets/batches/padding.py.
//
// Users are at random offsets of the shards, so each short history costs a few cache misses: its memory is prefetched
// some rows ahead. Everything else is one pass over the events.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

extern "C" {

// Row r copies events [start, stop) of `user` to the output from index place[r] on. Columns of a sample are at `*_at`
// (addresses; 0: absent), a user has end_of[user] events. `shuffle`: those that share a timestamp are ordered by
// a key of (seed, user, place).
struct GatherArgs {
  int64_t rows, users, num_items, shuffle;
  uint64_t seed;
  const int64_t *user, *start, *stop, *place;           // [rows]
  const int64_t *sample_of, *first_of, *end_of;         // [users]
  const int64_t *item_at, *timestamp_at, *event_at;     // [samples]
  int64_t *item, *timestamp, *event;                    // [events]; event may be null
};

// Right-pads `rows` histories to `width`. The last `held` events (0 or 1) of each are held out. The other events
// from skip[r] on are target positions: their flat index, the item that follows, and the time to it.
struct PadArgs {
  int64_t rows, width, held, num_items;
  const int64_t *item, *timestamp, *event, *offset, *skip;                // [N], [N], [N] or null, [rows + 1], [rows]
  int64_t *out_item, *out_gap, *out_event, *out_index, *out_time;         // [rows, width]
  int64_t *length, *ids;                                                  // [rows], room for all distinct ids
  int64_t *position, *target, *wait, *query_time;                         // [target positions]
};
}

namespace {

constexpr int64_t kAhead = 12;  // rows between prefetch and use
constexpr int64_t kLine = 64;
constexpr int64_t kMostLines = 8;  // cache lines of a column: the hardware prefetches long runs itself
constexpr int64_t kLargestGap = 31;

enum Problem : int64_t { kNone = 0, kNotMapped = 1, kBadItem = 2, kBadTime = 3, kBadSlice = 4 };
constexpr int64_t kProblems = 8;

template <typename T>
inline T load(const char* base, int64_t at) {
  T value;
  std::memcpy(&value, base + at * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

// The finaliser of splitmix64 over (seed, user, place), as `tie_keys` in packed.py has it.
inline uint64_t tie_key(uint64_t seed, uint64_t user, uint64_t place) {
  uint64_t key = seed + user * 0x9E3779B97F4A7C15ull + place * 0xD1B54A32D192ED03ull;
  key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9ull;
  key = (key ^ (key >> 27)) * 0x94D049BB133111EBull;
  return key ^ (key >> 31);
}

inline void ask_for(const char* from, int64_t bytes) {
  const int64_t last = std::min(bytes - 1, kMostLines * kLine);
  for (int64_t at = 0; at <= last; at += kLine) __builtin_prefetch(from + at);
  if (bytes > 0) __builtin_prefetch(from + last);
}

struct Source {
  const char *item, *timestamp, *event;  // of the user's first event
};

struct Gather {
  const GatherArgs& a;
  std::vector<Source> source;
  std::vector<std::pair<uint64_t, int64_t>> group;

  explicit Gather(const GatherArgs& args) : a(args), source(args.rows) {}

  int64_t row(int64_t r) {
    const Source& s = source[r];
    const int64_t start = a.start[r], count = a.stop[r] - start, to = a.place[r];
    int64_t *item = a.item + to, *timestamp = a.timestamp + to, *event = a.event ? a.event + to : nullptr;
    for (int64_t n = 0; n < count; ++n) item[n] = load<int32_t>(s.item, start + n);
    for (int64_t n = 0; n < count; ++n) timestamp[n] = load<int64_t>(s.timestamp, start + n);
    if (event)
      for (int64_t n = 0; n < count; ++n) event[n] = load<int16_t>(s.event, start + n);
    if (a.shuffle && count) shuffle_ties(r, item, timestamp, event);
    bool bad_item = false, bad_time = false;
    for (int64_t n = 0; n < count; ++n) bad_item |= item[n] < 1 || item[n] > a.num_items;
    for (int64_t n = 1; n < count; ++n) bad_time |= timestamp[n] < timestamp[n - 1];
    if (bad_item) return kBadItem;
    return bad_time ? kBadTime : kNone;
  }

  // Groups of one timestamp may reach beyond the row's slice on both sides: all of a group is ordered.
  void shuffle_ties(int64_t r, int64_t* item, const int64_t* timestamp, int64_t* event) {
    const Source& s = source[r];
    const int64_t start = a.start[r], stop = a.stop[r], end = a.end_of[a.user[r]];
    for (int64_t n = 0; n < stop - start;) {
      const int64_t now = timestamp[n];
      int64_t from = start + n, to = from + 1;
      if (n == 0)
        while (from > 0 && load<int64_t>(s.timestamp, from - 1) == now) --from;
      while (to < end && load<int64_t>(s.timestamp, to) == now) ++to;
      const int64_t first = start + n;
      n = to - start;
      if (to == from + 1) continue;
      group.clear();
      for (int64_t k = from; k < to; ++k) group.emplace_back(tie_key(a.seed, a.user[r], k), k);
      std::sort(group.begin(), group.end());
      for (int64_t k = first; k < std::min(to, stop); ++k) {
        item[k - start] = load<int32_t>(s.item, group[k - from].second);
        if (event) event[k - start] = load<int16_t>(s.event, group[k - from].second);
      }
    }
  }
};

inline int64_t gap_bucket(int64_t before, int64_t after) {
  const uint64_t seconds = after > before ? static_cast<uint64_t>(after) - static_cast<uint64_t>(before) : 0;
  return seconds >= (1ull << 30) ? kLargestGap : 64 - __builtin_clzll(seconds + 1);
}

// The distinct ids of a batch in order: a bit for each item, a bit for each word of those, and how many ids come
// before a word. Kept from call to call by each thread, and left all zero, so that a batch costs only its own items.
struct Distinct {
  struct Word {
    uint64_t bits;
    int64_t before;
  };
  std::vector<Word> words;
  std::vector<uint64_t> used;

  void fit(int64_t num_items) {
    const size_t wanted = static_cast<size_t>(num_items / 64 + 1);
    if (words.size() < wanted) {
      words.resize(wanted, Word{0, 0});
      used.resize(wanted / 64 + 1, 0);
    }
  }
  void add(int64_t id) {
    words[id >> 6].bits |= 1ull << (id & 63);
    used[id >> 12] |= 1ull << ((id >> 6) & 63);
  }
  template <typename Visit>
  void for_each_word(int64_t num_items, Visit visit) {
    for (int64_t u = 0; u <= num_items >> 12; ++u)
      for (uint64_t left = used[u]; left; left &= left - 1) visit(u * 64 + __builtin_ctzll(left));
  }
  int64_t list(int64_t num_items, int64_t* ids) {
    int64_t count = 0;
    for_each_word(num_items, [&](int64_t w) {
      words[w].before = count;
      for (uint64_t left = words[w].bits; left; left &= left - 1) ids[count++] = w * 64 + __builtin_ctzll(left);
    });
    return count;
  }
  int64_t index(int64_t id) const {
    const Word& word = words[id >> 6];
    return word.before + __builtin_popcountll(word.bits & ((1ull << (id & 63)) - 1));
  }
  void clear(int64_t num_items) {
    for_each_word(num_items, [&](int64_t w) { words[w].bits = 0; });
    std::fill(used.begin(), used.begin() + (num_items >> 12) + 1, 0);
  }
};

thread_local Distinct distinct;

}  // namespace

extern "C" {

// 0, or 8 * row + the `Problem` of the first row that has one.
int64_t gather_histories(const GatherArgs* a) {
  Gather gather(*a);
  for (int64_t r = 0; r < a->rows; ++r) {
    const int64_t user = a->user[r], start = a->start[r], stop = a->stop[r];
    if (user < 0 || user >= a->users || start < 0 || stop < start || stop > a->end_of[user])
      return kProblems * r + kBadSlice;
    const int64_t sample = a->sample_of[user], first = a->first_of[user];
    if (!a->item_at[sample]) return kProblems * r + kNotMapped;
    gather.source[r] = {reinterpret_cast<const char*>(a->item_at[sample]) + 4 * first,
                        reinterpret_cast<const char*>(a->timestamp_at[sample]) + 8 * first,
                        a->event ? reinterpret_cast<const char*>(a->event_at[sample]) + 2 * first : nullptr};
  }
  for (int64_t r = -kAhead; r < a->rows; ++r) {
    if (const int64_t next = r + kAhead; next < a->rows) {
      const Source& s = gather.source[next];
      const int64_t start = a->start[next], count = a->stop[next] - start;
      ask_for(s.item + 4 * start, 4 * count);
      ask_for(s.timestamp + 8 * start, 8 * count);
      if (s.event) ask_for(s.event + 2 * start, 2 * count);
    }
    if (r < 0) continue;
    if (const int64_t problem = gather.row(r)) return kProblems * r + problem;
  }
  return 0;
}

// The number of distinct ids, 0 (padding) among them; -1 where an item is none of 1..num_items, -2 where a row has
// no input event or skips more events than it has.
int64_t pad_histories(const PadArgs* a) {
  for (int64_t r = 0; r < a->rows; ++r) {
    const int64_t count = a->offset[r + 1] - a->offset[r] - a->held;
    if (count < 1 || count > a->width || (a->held && (a->skip[r] < 0 || a->skip[r] > count))) return -2;
  }
  for (int64_t n = a->offset[0]; n < a->offset[a->rows]; ++n)
    if (a->item[n] < 1 || a->item[n] > a->num_items) return -1;
  distinct.fit(a->num_items);
  distinct.add(0);
  int64_t asked = 0;
  for (int64_t r = 0; r < a->rows; ++r) {
    const int64_t from = a->offset[r], count = a->offset[r + 1] - from - a->held, at = r * a->width;
    const int64_t *item = a->item + from, *times = a->timestamp + from;
    a->length[r] = count;
    std::memcpy(a->out_item + at, item, sizeof(int64_t) * count);
    std::fill(a->out_item + at + count, a->out_item + at + a->width, 0);
    std::memcpy(a->out_time + at, times, sizeof(int64_t) * count);
    std::fill(a->out_time + at + count, a->out_time + at + a->width, 0);
    for (int64_t k = 0; k < count; ++k) distinct.add(item[k]);
    int64_t* gap = a->out_gap + at;
    std::fill(gap + count, gap + a->width, 0);
    gap[0] = 0;
    for (int64_t k = 1; k < count; ++k) gap[k] = gap_bucket(times[k - 1], times[k]);
    if (a->event) {
      int64_t* event = a->out_event + at;
      for (int64_t k = 0; k < count; ++k) event[k] = a->event[from + k] + 2;
      std::fill(event + count, event + a->width, 0);
    }
    if (!a->held) continue;  // the event after the last one shown is not known
    for (int64_t k = a->skip[r]; k < count; ++k, ++asked) {
      a->position[asked] = at + k;
      a->target[asked] = item[k + 1];
      a->query_time[asked] = times[k + 1];
      a->wait[asked] = k + 1 < count ? gap[k + 1] : gap_bucket(times[k], times[k + 1]);
    }
  }
  const int64_t count = distinct.list(a->num_items, a->ids);
  for (int64_t n = 0; n < a->rows * a->width; ++n) a->out_index[n] = distinct.index(a->out_item[n]);
  distinct.clear(a->num_items);
  return count;
}
}

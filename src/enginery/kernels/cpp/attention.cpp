// Attention over a paged cache with an online softmax (Milakov & Gimelshein, 2018; FlashAttention's tiling, Dao et al.,
// 2022).
//
// A task is a tile of query tokens of one sequence times one KV head: all its query heads are rows of the same two
// matrix products, so keys and values are read once for all of them. Keys pass in blocks that start at multiples of
// kBlock of their position in the sequence. A row takes the same steps in the same order whatever tile it lies in: keys
// that it may not see are exact no-ops. So decode, chunked and whole prefill of one token give the same bits.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels.h"
#include "rows.h"
#include "scratch.h"
#include "share.h"

namespace enginery {
namespace {

constexpr int kBlock = 64;                // keys of one step of the online softmax
constexpr int kTileRows = 8 * kMaxRows;   // rows of a query tile
constexpr int kGatherFrom = 2 * kMaxRows; // rows that pay for copying a block's values side by side
static_assert(kBlock <= kChunk && kBlock % kLanes == 0, "a row of weights is one chunk");

constexpr float kNone = -std::numeric_limits<float>::infinity();

// How the products read T: keys across (sixteen keys are the columns), values along (sixteen sizes are).
template <class T>
struct Reads {
  static constexpr Format kKeys = Format::kFloat, kValues = Format::kFloat;
};
template <>
struct Reads<bf16> {
  static constexpr Format kKeys = Format::kPairs, kValues = Format::kBfloat;
};
template <>
struct Reads<f16> {
  static constexpr Format kKeys = Format::kFloat, kValues = Format::kHalf;
};

struct Task {
  int64_t sequence, first, count, head, cost;
};

// Which keys of a sequence a token at `position` may see.
struct Range {
  int64_t begin, end;
};

inline Range visible(const AttentionCall& call, int64_t position, int64_t length) {
  const int64_t begin = call.window > position ? 0 : position - call.window + 1;
  return {begin, call.causal ? std::min(position + 1, length) : length};
}

// Working memory of one thread, sized once per call.
struct Workspace {
  float *queries, *weights, *keys, *values, *output, *best, *total, *zeros;

  static int64_t padded_values(const AttentionCall& call) { return round_up(call.value_size, kLanes); }
  static int64_t padded_keys(const AttentionCall& call) { return round_up(call.key_size + 1, kChunk); }

  static size_t floats(const AttentionCall& call, int64_t rows) {
    return rows * (padded_keys(call) + kChunk + padded_values(call) + 2) + kLanes +
           kBlock * (call.key_size + padded_values(call)) + padded_keys(call) + 8 * kLanes;
  }

  Workspace(const AttentionCall& call, int64_t rows, float* memory) {
    const auto take = [&memory](int64_t count) {
      float* taken = memory;
      memory += round_up(count, kLanes);
      return taken;
    };
    queries = take(rows * padded_keys(call));
    weights = take(rows * kChunk);
    keys = take(kBlock * call.key_size);
    values = take(kBlock * padded_values(call));
    output = take(rows * padded_values(call));
    best = take(rows);
    total = take(rows);
    zeros = take(padded_keys(call));
    std::memset(zeros, 0, padded_keys(call) * sizeof(float));
  }
};

template <class T>
class Attend {
 public:
  Attend(const AttentionCall& call, const Workspace& work, const Task& task)
      : call_(call),
        work_(work),
        task_(task),
        groups_(call.query_heads / call.kv_heads),
        rows_(task.count * groups_),
        tiles_(rows_),
        length_(call.seq_lens[task.sequence]),
        position_(length_ - call.query_start[task.sequence + 1] + task.first),
        table_(call.tables + task.sequence * call.table_stride),
        keys_(static_cast<const T*>(call.key_cache.data) + task.head * call.key_cache.head),
        values_(static_cast<const T*>(call.value_cache.data) + task.head * call.value_cache.head),
        steps_((call.key_size + kPair - 1) / kPair),
        chunks_((steps_ * elements_per_step(Reads<T>::kKeys) + kChunk - 1) / kChunk),
        width_(Workspace::padded_values(call)),
        full_(call.value_size / kLanes * kLanes) {}

  void run() {
    start();
    const Range range{visible(call_, position_, length_).begin,
                      visible(call_, position_ + task_.count - 1, length_).end};
    Rows rows, next;
    locate(range.begin / kBlock * kBlock, range, rows);
    for (int64_t block = range.begin / kBlock * kBlock; block < range.end; block += kBlock) {
      const Range keys{std::max(block, range.begin), std::min<int64_t>(block + kBlock, range.end)};
      locate(block + kBlock, range, next);
      score(block, keys, rows, next);
      for (int64_t row = 0; row < rows_; ++row) weigh(row, block, keys);
      accumulate(block, keys, rows, next);
      std::swap(rows, next);
    }
    finish();
  }

 private:
  static constexpr int kPair = Reads<T>::kKeys == Format::kPairs ? 2 : 1;

  // Where the keys and values of one block lie; keys outside the range are zeros and have no value.
  struct Rows {
    const T* keys[kBlock];
    const T* values[kBlock];
  };

  int64_t head(int64_t row) const { return task_.head * groups_ + row % groups_; }
  int64_t token(int64_t row) const { return task_.first + row / groups_; }
  int64_t position(int64_t row) const { return position_ + row / groups_; }

  void locate(int64_t block, Range range, Rows& rows) const {
    for (int64_t at = 0; at < kBlock;) {
      const int64_t key = block + at;
      if (key < range.begin || key >= range.end) {
        rows.keys[at] = rows.values[at] = reinterpret_cast<const T*>(work_.zeros);
        ++at;
        continue;
      }
      const int64_t page = table_[key / call_.block_size], slot = key % call_.block_size;
      const int64_t end = std::min({at + call_.block_size - slot, range.end - block, int64_t(kBlock)});
      const T* keys = keys_ + page * call_.key_cache.block + slot * call_.key_cache.token;
      const T* values = values_ + page * call_.value_cache.block + slot * call_.value_cache.token;
      for (; at < end; ++at, keys += call_.key_cache.token, values += call_.value_cache.token) {
        rows.keys[at] = keys;
        rows.values[at] = values;
      }
    }
  }

  // Blocks lie scattered over the pool, where no hardware foresees them.
  static void prefetch(const T* row, int64_t size) {
    for (int64_t at = 0; at < size; at += int64_t(kLine / sizeof(T))) __builtin_prefetch(row + at);
  }

  void start() {
    for (int64_t tile = 0; tile < tiles_.count; ++tile)
      for (int r = 0; r < tiles_.size(tile); ++r) {
        const int64_t row = tiles_.begin(tile) + r;
        const T* queries = static_cast<const T*>(call_.query.data);
        const T* query = queries + token(row) * call_.query.token + head(row) * call_.query.head;
        for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
          float* out = work_.queries + (tiles_.begin(tile) * chunks_ + chunk * tiles_.size(tile) + r) * kChunk;
          pack_operand_chunk(query, call_.key_size, steps_ * elements_per_step(Reads<T>::kKeys), chunk, out);
        }
      }
    // A sink is a logit that was met before all keys and has no value.
    for (int64_t row = 0; row < rows_; ++row) {
      work_.best[row] = call_.sinks == nullptr ? kNone : float(call_.sinks[head(row)]);
      work_.total[row] = call_.sinks == nullptr ? 0.0f : 1.0f;
    }
    std::memset(work_.output, 0, rows_ * width_ * sizeof(float));
  }

  // The sixteen-key groups of a block that hold a key of the range.
  static int first_group(int64_t block, Range keys) { return int((keys.begin - block) / kLanes); }
  static int last_group(int64_t block, Range keys) { return int((keys.end - block + kLanes - 1) / kLanes); }

  // weights[row][j] = q · k
  void score(int64_t block, Range keys, const Rows& rows, const Rows& next) {
    const int first = first_group(block, keys), last = last_group(block, keys);
    for (int group = first; group < last; ++group) {
      const int at = group * kLanes;
      for (int lane = 0; lane < kLanes; ++lane) prefetch(next.keys[at + lane], call_.key_size);
      pack_columns(rows.keys + at, call_.key_size, work_.keys + at * steps_);
    }
    Product product{};
    product.b = work_.keys + first * kLanes * steps_;
    product.b_step = kLanes;
    product.b_vector = kLanes * steps_;
    product.steps = steps_;
    product.c_row = kChunk;
    for (int64_t tile = 0; tile < tiles_.count; ++tile) {
      product.a = work_.queries + tiles_.begin(tile) * chunks_ * kChunk;
      product.c = work_.weights + tiles_.begin(tile) * kChunk + first * kLanes;
      multiply(Reads<T>::kKeys, tiles_.size(tile), last - first, product);
    }
  }

  // One step of the online softmax for one row: scores become weights, what was summed before is rescaled.
  void weigh(int64_t row, int64_t block, Range keys) {
    const int first = first_group(block, keys), last = last_group(block, keys);
    float* weights = work_.weights + row * kChunk;
    const Range seen = visible(call_, position(row), length_);
    if (seen.begin >= keys.end || seen.end <= keys.begin) {
      std::memset(weights + first * kLanes, 0, (last - first) * kLanes * sizeof(float));
      return;
    }
    Vec largest = broadcast(kNone);
    for (int group = first; group < last; ++group) {
      const int64_t key = block + group * kLanes;
      Vec scores = shape(load(weights + group * kLanes), row, key);
      if (key < seen.begin || key + kLanes > seen.end) scores = keep_lanes(scores, seen.begin - key, seen.end - key);
      store(weights + group * kLanes, scores);
      largest = max(largest, scores);
    }
    const float before = work_.best[row], best = std::max(before, reduce_max(largest));
    const Vec shift = broadcast(best == kNone ? 0.0f : best);  // −∞ − 0: every weight is zero
    Vec sum = broadcast(0.0f);
    for (int group = first; group < last; ++group) {
      const Vec weight = exp(sub(load(weights + group * kLanes), shift));
      store(weights + group * kLanes, weight);
      sum = add(sum, weight);
    }
    if (best != before) {
      const Vec scale = exp(sub(broadcast(before), shift));
      work_.total[row] *= scale.part[0][0];
      float* output = work_.output + row * width_;
      for (int64_t at = 0; at < width_; at += kLanes) store(output + at, mul(load(output + at), scale));
    }
    work_.total[row] += reduce_sum(sum);
    work_.best[row] = best;
  }

  // scale, soft cap, ALiBi
  Vec shape(Vec scores, int64_t row, int64_t key) const {
    scores = mul(scores, broadcast(float(call_.scale)));
    if (call_.softcap != 0.0)
      scores = mul(tanh(mul(scores, broadcast(float(1.0 / call_.softcap)))), broadcast(float(call_.softcap)));
    if (call_.slopes != nullptr) {
      const Vec distance = add(lane_numbers(), broadcast(float(key - position(row))));
      scores = fma(distance, broadcast(float(call_.slopes[head(row)])), scores);
    }
    return scores;
  }

  // output[row] += weights[row] · V, one chain over the keys in order; a weight of zero adds nothing.
  void accumulate(int64_t block, Range keys, const Rows& rows, const Rows& next) {
    const int begin = int(keys.begin - block), end = int(keys.end - block);
    for (int at = begin; at < end; ++at) prefetch(next.values[at], call_.value_size);
    if (rows_ >= kGatherFrom) {
      for (int at = begin; at < end; ++at) copy_chunk(rows.values[at], 0, full_, work_.values + at * width_);
      add_product(Format::kFloat, work_.values + begin * width_, width_, begin, end - begin);
    }
    const int64_t stride = call_.value_cache.token;
    for (int at = begin, stop; at < end; at = stop) {
      for (stop = at + 1; stop < end && rows.values[stop] == rows.values[stop - 1] + stride;) ++stop;
      if (rows_ < kGatherFrom) add_product(Reads<T>::kValues, rows.values[at], stride, at, stop - at);
      if (full_ < call_.value_size) add_tail_product(rows.values[at], at, stop - at);
    }
  }

  void add_product(Format format, const void* values, int64_t stride, int64_t at, int64_t steps) {
    Product product{};
    product.b = values;
    product.b_step = stride;
    product.b_vector = kLanes;
    product.steps = steps;
    multiply_tiles(format, product, at, 0, int(full_ / kLanes));
  }

  // The last value_size % 16 columns, padded with zeros.
  void add_tail_product(const T* values, int64_t at, int64_t steps) {
    float padded[kBlock * kLanes] = {};
    for (int64_t step = 0; step < steps; ++step)
      copy_chunk(values + step * call_.value_cache.token, full_, call_.value_size, padded + step * kLanes);
    Product product{};
    product.b = padded;
    product.b_step = kLanes;
    product.steps = steps;
    multiply_tiles(Format::kFloat, product, at, full_, 1);
  }

  void multiply_tiles(Format format, Product& product, int64_t at, int64_t column, int vectors) {
    product.c_row = width_;
    product.accumulate = true;
    for (int64_t tile = 0; tile < tiles_.count; ++tile) {
      product.a = work_.weights + tiles_.begin(tile) * kChunk + at;
      product.c = work_.output + tiles_.begin(tile) * width_ + column;
      multiply(format, tiles_.size(tile), vectors, product);
    }
  }

  void finish() {
    for (int64_t row = 0; row < rows_; ++row) {
      float* values = work_.output + row * width_;
      const Vec scale = broadcast(1.0f / work_.total[row]);
      for (int64_t at = 0; at < width_; at += kLanes) store(values + at, mul(load(values + at), scale));
      T* out = static_cast<T*>(call_.output) + (token(row) * call_.query_heads + head(row)) * call_.value_size;
      finish_row<T>(values, nullptr, call_.value_size, out);
    }
  }

  const AttentionCall& call_;
  const Workspace& work_;
  const Task& task_;
  int64_t groups_, rows_;
  Tiles tiles_;
  int64_t length_, position_;
  const int32_t* table_;
  const T *keys_, *values_;
  int64_t steps_, chunks_, width_, full_;
};

template <class T>
void write_cache(const AttentionCall& call) {
#pragma omp for schedule(static)
  for (int64_t token = 0; token < call.tokens; ++token) {
    const int64_t slot = call.slots[token];
    if (slot < 0) continue;
    const int64_t block = slot / call.block_size, offset = slot % call.block_size;
    const auto write = [&](const Heads& from, const Cache& to, int64_t size) {
      for (int64_t head = 0; head < call.kv_heads; ++head)
        std::memcpy(static_cast<T*>(to.data) + block * to.block + head * to.head + offset * to.token,
                    static_cast<const T*>(from.data) + token * from.token + head * from.head, size * sizeof(T));
    };
    write(call.key, call.key_cache, call.key_size);
    write(call.value, call.value_cache, call.value_size);
  }
}

// Tiles of all sequences and heads, the dearest first, so that threads taking them one by one end together.
std::vector<Task> plan(const AttentionCall& call, int64_t tile_tokens) {
  std::vector<Task> tasks;
  for (int64_t sequence = 0; sequence < call.sequences; ++sequence) {
    const int64_t begin = call.query_start[sequence], end = call.query_start[sequence + 1];
    const int64_t length = call.seq_lens[sequence];
    for (int64_t first = begin; first < end; first += tile_tokens) {
      const int64_t count = std::min(tile_tokens, end - first), position = length - end + first;
      const int64_t keys = visible(call, position + count - 1, length).end - visible(call, position, length).begin;
      for (int64_t head = 0; head < call.kv_heads; ++head)
        tasks.push_back({sequence, first, count, head, keys * (count + kLanes)});
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
  return tasks;
}

template <class T>
void clear_padding(const AttentionCall& call) {
  const int64_t row = call.query_heads * call.value_size;
  T* output = static_cast<T*>(call.output);
  const int64_t begin = call.sequences > 0 ? call.query_start[0] : 0;
  const int64_t end = call.sequences > 0 ? call.query_start[call.sequences] : 0;
  std::memset(static_cast<void*>(output), 0, begin * row * sizeof(T));
  std::memset(static_cast<void*>(output + end * row), 0, (call.tokens - end) * row * sizeof(T));
}

template <class T>
void run(const AttentionCall& call) {
  const int64_t groups = call.query_heads / call.kv_heads, tile_tokens = std::max<int64_t>(1, kTileRows / groups);
  const std::vector<Task> tasks = plan(call, tile_tokens);
  int64_t rows = 0;
  double operations = 0.0;
  for (const Task& task : tasks) {
    rows = std::max(rows, task.count * groups);
    operations += 2.0 * task.cost * groups * (call.key_size + call.value_size);
  }
  const int threads = useful_threads(call.threads, operations / kOperationsPerNanosecond);
  const size_t bytes = round_up(Workspace::floats(call, rows) * sizeof(float), kLine);
  char* scratch = thread_scratch().reserve(threads * bytes);
  clear_padding<T>(call);
#pragma omp parallel num_threads(threads)
  {
    const Workspace work(call, rows, reinterpret_cast<float*>(scratch + omp_get_thread_num() * bytes));
    if (call.slots != nullptr) write_cache<T>(call);
#pragma omp for schedule(dynamic, 1)
    for (size_t task = 0; task < tasks.size(); ++task) Attend<T>(call, work, tasks[task]).run();
  }
}

// float64 serves comparisons only: one row after another, no tiles.
void attend_doubles(const AttentionCall& call, int64_t sequence, int64_t token, int64_t head) {
  const int64_t length = call.seq_lens[sequence], position = length - call.query_start[sequence + 1] + token;
  const int64_t kv_head = head / (call.query_heads / call.kv_heads);
  const Range seen = visible(call, position, length);
  const auto row_of = [&](const Cache& cache, int64_t key) {
    const int64_t block = call.tables[sequence * call.table_stride + key / call.block_size];
    const double* head_data = static_cast<const double*>(cache.data) + block * cache.block + kv_head * cache.head;
    return head_data + key % call.block_size * cache.token;
  };
  const double* query = static_cast<const double*>(call.query.data) + token * call.query.token + head * call.query.head;
  double best = call.sinks == nullptr ? -std::numeric_limits<double>::infinity() : call.sinks[head];
  std::vector<double> weights;
  for (int64_t key = seen.begin; key < seen.end; ++key) {
    const double* keys = row_of(call.key_cache, key);
    double score = 0.0;
    for (int64_t at = 0; at < call.key_size; ++at) score += query[at] * keys[at];
    score *= call.scale;
    if (call.softcap != 0.0) score = call.softcap * std::tanh(score / call.softcap);
    if (call.slopes != nullptr) score += call.slopes[head] * double(key - position);
    best = std::max(best, score);
    weights.push_back(score);
  }
  double total = call.sinks == nullptr ? 0.0 : std::exp(call.sinks[head] - best);
  std::vector<double> sums(call.value_size);
  for (int64_t key = seen.begin; key < seen.end; ++key) {
    const double weight = std::exp(weights[key - seen.begin] - best), *values = row_of(call.value_cache, key);
    total += weight;
    for (int64_t at = 0; at < call.value_size; ++at) sums[at] += weight * values[at];
  }
  double* out = static_cast<double*>(call.output) + (token * call.query_heads + head) * call.value_size;
  for (int64_t at = 0; at < call.value_size; ++at) out[at] = sums[at] / total;
}

void run_doubles(const AttentionCall& call) {
  clear_padding<double>(call);
  if (call.slots != nullptr) write_cache<double>(call);
  for (int64_t sequence = 0; sequence < call.sequences; ++sequence)
    for (int64_t token = call.query_start[sequence]; token < call.query_start[sequence + 1]; ++token)
      for (int64_t head = 0; head < call.query_heads; ++head) attend_doubles(call, sequence, token, head);
}

}  // namespace

void attention(const AttentionCall& call) {
  switch (call.dtype) {
    case DType::kFloat32: return run<float>(call);
    case DType::kBFloat16: return run<bf16>(call);
    case DType::kFloat16: return run<f16>(call);
    case DType::kFloat64: return run_doubles(call);
  }
}

}  // namespace enginery

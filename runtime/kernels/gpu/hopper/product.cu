// out = silu(gate) * up, the halves of x W^T: x [rows, 64 steps] and W of 16 bits, sums in float32.
//
// Compiled for ROWS, a multiple of 32 up to 256 that is no less than `rows`; HALF (float16, else bfloat16);
// STAGES of the pipeline. product.py says what is passed.
//
// A tile is 128 rows of W times all rows of x. Two programs of a cluster compute two neighbouring tiles; each
// loads half of x for both. All clusters get the same share of the steps of all tiles (Stream-K, Osama et
// al., 2023), however many tiles there are: a share may begin and end within a tile. Who has a tile's first step
// writes the tile, and adds up what the others left in memory, in the order of the steps. So the sums depend
// on W's shape and the number of clusters, not on timing.
//
// One warp loads; two groups of four warps multiply, each half of the tile's rows of W. Sources: the PTX ISA,
// "Asynchronous Warpgroup Level Matrix Instructions" and "cp.async.bulk.tensor".

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
struct alignas(64) TensorMap { char bytes[128]; };

constexpr int STEP = 64;    // inputs at a time: the 128 bytes that the layout in shared memory is made for
constexpr int HEIGHT = 128; // rows of W in a tile
constexpr int SIDES = 2;    // programs of a cluster
constexpr int SUMS = ROWS / 2;  // of one thread
constexpr int W_BYTES = HEIGHT * STEP * 2, X_BYTES = ROWS * STEP * 2, STAGE_BYTES = W_BYTES + X_BYTES;
constexpr int WIDTH = HEIGHT / 4;       // outputs of one group
constexpr int CHUNK = 32;              // rows that are put in order at a time
constexpr int CHUNK_BYTES = CHUNK * WIDTH * 2;
// What is read once should not drive out what is read again: CUTLASS's CacheHintSm90::EVICT_FIRST.
constexpr u64 READ_ONCE = 0x12F0000000000000ull;

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void init_barrier(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

__device__ __forceinline__ void wait_for(u32 barrier, u32 parity) {
  asm volatile("{\n.reg .pred done;\nagain_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again_%=;\n}" ::"r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ void expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Without a fence: what was read are operands of products that have ended.
__device__ __forceinline__ void arrive_at(u32 barrier, u32 side) {
  asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier), "r"(side) : "memory");
}

__device__ __forceinline__ void meet_cluster() {
  asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
}

__device__ __forceinline__ void meet_group(int group) { asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory"); }

__device__ __forceinline__ void load_weights(u32 to, const TensorMap* map, u32 barrier, int input, int tile) {
  // 8 rows of the gate, then 8 of the up projection: a thread has sums of both for the same outputs.
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %4, %5}], [%2], %6;"
      ::"r"(to), "l"(map), "r"(barrier), "r"(input), "r"(0), "r"(tile * (HEIGHT / 16)), "l"(READ_ONCE) : "memory");
}

__device__ __forceinline__ void load_x_for_both(u32 to, const TensorMap* map, u32 barrier, int input, int row) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4}], [%2], %5;"
      ::"r"(to), "l"(map), "r"(barrier), "r"(input), "r"(row), "h"((u16)3) : "memory");
}

// Of rows of 128 bytes, swizzled, 8 rows to a block.
__device__ __forceinline__ u64 operand(u32 address) {
  return (u64)((address & 0x3FFFF) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// sums = a b^T, plus sums if `add`: 64 rows of W times all of x, 16 inputs. product.py has the instruction.
__device__ __forceinline__ void multiply(float (&sums)[SUMS], u64 a, u64 b, int add) { MULTIPLY }

__device__ __forceinline__ u32 packed(float low, float high) {
  u32 both;
#if HALF
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
  return both;
}

__device__ __forceinline__ float gated(float gate, float up) { return __fdividef(gate, 1.0f + __expf(-gate)) * up; }

// Where a run of 8 outputs of a row lies, in 16 bytes: no two of those stored at a time meet in a bank.
__device__ __forceinline__ int place_of(int row, int run) { return run ^ row / 2 % 4; }

// Rounds the results of 16 rows and the group's outputs.
__device__ __forceinline__ void put(u32 to, const float* sums, int row, int warp, int lane) {
  row += lane % 16;
  const u32 low = packed(gated(sums[0], sums[2]), gated(sums[1], sums[3]));
  const u32 high = packed(gated(sums[4], sums[6]), gated(sums[5], sums[7]));
  const u32 at = to + row * (WIDTH * 2) + place_of(row, warp) * 16;
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(at), "r"(low), "r"(high) : "memory");
}

__device__ __forceinline__ void write(const float (&sums)[SUMS], u16* out, u32 scratch, int group, int rows, int stride) {
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
#pragma unroll
  for (int chunk = 0; chunk < ROWS / CHUNK; chunk++) {
    if (chunk * CHUNK >= rows) break;
    meet_group(group);
#pragma unroll
    for (int block = 0; block < CHUNK / 8; block += 2)
      put(scratch, sums + (chunk * CHUNK / 8 + block) * 4, 8 * block, warp, lane);
    meet_group(group);
    constexpr int RUNS = WIDTH / 8;
#pragma unroll
    for (int at = thread; at < CHUNK * RUNS; at += 128) {
      const int row = at / RUNS, run = at % RUNS, place = place_of(row, run);
      u32 a, b, c, d;
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
          : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(scratch + row * (WIDTH * 2) + place * 16) : "memory");
      if (chunk * CHUNK + row < rows)
        *(uint4*)(out + (u64)(chunk * CHUNK + row) * stride + run * 8) = make_uint4(a, b, c, d);
    }
  }
}

__device__ __forceinline__ void leave(const float (&sums)[SUMS], float4* memory, u32* flag, int group) {
  const int thread = threadIdx.x % 128;
#pragma unroll
  for (int i = 0; i < SUMS / 4; i++)
    __stcg(memory + i * 128 + thread, make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]));
  meet_group(group);
  if (thread == 0) asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(1) : "memory");
}

__device__ __forceinline__ void take(float (&sums)[SUMS], const float4* memory, u32* flag, int group) {
  const int thread = threadIdx.x % 128;
  if (thread == 0) {
    u32 there;
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(there) : "l"(flag) : "memory");
    while (!there);
    *(volatile u32*)flag = 0;  // for the next launch
  }
  meet_group(group);
#pragma unroll
  for (int i = 0; i < SUMS / 4; i++) {
    const float4 part = __ldcg(memory + i * 128 + thread);
    sums[4 * i] += part.x;
    sums[4 * i + 1] += part.y;
    sums[4 * i + 2] += part.z;
    sums[4 * i + 3] += part.w;
  }
}

__device__ __forceinline__ int share(int cluster, int total) {
  return (int)((long long)cluster * total / (gridDim.x / SIDES));
}

extern "C" __global__ void __cluster_dims__(SIDES, 1, 1) __launch_bounds__(384, 1)
product(const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap inputs, u16* out,
        float4* left, u32* flags, int rows, int pairs, int steps) {
  extern __shared__ char memory[];
  const u32 ring = (shared_address(memory) + 1023) & ~1023u, scratch = ring + STAGES * STAGE_BYTES;
  const u32 full = scratch + 2 * CHUNK_BYTES, empty = full + 8 * STAGES;
  const int side = blockIdx.x % SIDES, cluster = blockIdx.x / SIDES;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; stage++) {
      init_barrier(full + 8 * stage, 1);
      init_barrier(empty + 8 * stage, 2 * SIDES);  // each group of each program
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("prefetch.tensormap [%0];\nprefetch.tensormap [%1];" ::"l"(&weights), "l"(&inputs) : "memory");
  }
  asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");  // the fence is enough
  const int total = pairs * steps, first = share(cluster, total), last = share(cluster + 1, total);
  int stage = 0, parity = 0;  // how far the ring is through, the same for those who fill and those who use it
  int pair = first / steps, step = first % steps;

  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    if (threadIdx.x == 0) {
      for (int i = first; i < last; i++) {
        const u32 barrier = full + 8 * stage, to = ring + stage * STAGE_BYTES;
        wait_for(empty + 8 * stage, parity ^ 1);  // at once, the first time round
        expect(barrier, STAGE_BYTES);
        load_weights(to, &weights, barrier, step * STEP, pair * SIDES + side);
        load_x_for_both(to + W_BYTES + side * (X_BYTES / SIDES), &inputs, barrier, step * STEP, side * (ROWS / SIDES));
        if (++stage == STAGES) stage = 0, parity ^= 1;
        if (++step == steps) step = 0, pair++;
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    const int group = threadIdx.x / 128 - 1, thread = threadIdx.x % 128;
    float sums[SUMS];
    for (int i = first; i < last; pair++) {
      const int from = step, to = min(steps, step + last - i);
      int before = 0;
      for (; step < to; step++, i++) {
        wait_for(full + 8 * stage, parity);
        const u32 at = ring + stage * STAGE_BYTES;
        const u64 a = operand(at + group * (W_BYTES / 2)), b = operand(at + W_BYTES);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < STEP / 16; k++) multiply(sums, a + 2 * k, b + 2 * k, k > 0 || step > from);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        if (step > from) {
          asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
          if (thread < SIDES) arrive_at(empty + 8 * before, thread);
        }
        before = stage;
        if (++stage == STAGES) stage = 0, parity ^= 1;
      }
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
      for (int j = 0; j < SUMS; j++) asm volatile("" : "+f"(sums[j])::"memory");
      if (thread < SIDES) arrive_at(empty + 8 * before, thread);
      const int mine = blockIdx.x * 2 + group;
      if (from > 0) {
        leave(sums, left + (u64)mine * (SUMS / 4) * 128, flags + mine, group);
      } else {
        for (int other = 1; step < steps; other++) {
          const int theirs = mine + other * SIDES * 2;
          take(sums, left + (u64)theirs * (SUMS / 4) * 128, flags + theirs, group);
          step = min(steps, share(cluster + other + 1, total) - pair * steps);
        }
        const int output = ((pair * SIDES + side) * 2 + group) * WIDTH;
        write(sums, out + output, scratch + group * CHUNK_BYTES, group, rows, pairs * SIDES * 2 * WIDTH);
      }
      step = 0;
    }
  }
  meet_cluster();  // nobody's shared memory goes while another may still write to it
}

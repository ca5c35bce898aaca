"""Bugs for scripts/mutation_check.py, of the kinds that such code has had before.

Each replaces a text that its file holds exactly once. ``tests`` are NAMEs of tests/*/test_NAME.py
that ought to notice, or THREADS for those of tests/native.
"""

from __future__ import annotations

from dataclasses import dataclass

THREADS = "threads"


@dataclass(frozen=True)
class Mutant:
    """One bug."""

    name: str
    file: str
    old: str
    new: str
    tests: str

    @property
    def kind(self) -> str:
        """The part of scripts/sanitize.sh that tests it."""
        if self.tests == THREADS:
            return THREADS
        return "cuda" if self.file.startswith("csrc/cuda/") else "address"

    def planted(self, text: str) -> str:
        """The text of the file with the bug."""
        found = text.count(self.old)
        if found != 1:
            raise ValueError(
                f"{self.name!r} needs its old text once in {self.file}, found it {found} times: "
                f"{self.old!r}"
            )
        return text.replace(self.old, self.new)


MUTANTS = [
    # Loops over vectors: the tail, the vector before it, the pieces.
    Mutant(
        "a tail of one element is left out",
        "csrc/cpu/loops/spans.h",
        "  if (i < end) {\n    f(i, end - i);",
        "  if (i + 1 < end) {\n    f(i, end - i);",
        "ops",
    ),
    Mutant(
        "a vector is taken where one element is missing",
        "csrc/cpu/loops/spans.h",
        "i + kSize<V> <= end;",
        "i + kSize<V> <= end + 1;",
        "rounding_step",
    ),
    Mutant(
        "every vector of a piece gets the first one's gradient",
        "csrc/cpu/loops/rounding_step.h",
        "load<V>(grad_v + (i - begin), left)",
        "load<V>(grad_v, left)",
        "rounding_step",
    ),
    Mutant(
        "the sum leaves out the last element",
        "csrc/cpu/isa/vec.h",
        "for (int64_t i = 0; i < size; ++i) {\n        lanes[i] +=",
        "for (int64_t i = 0; i + 1 < size; ++i) {\n        lanes[i] +=",
        "ops",
    ),
    # The grid: clamps, ties, runs of one scale.
    Mutant(
        "codes are not clamped above",
        "csrc/math/rounding.h",
        "return max_(grid.qmin, min_(grid.qmax, code));",
        "return max_(grid.qmin, code);",
        "ops",
    ),
    Mutant(
        "h is not clipped above",
        "csrc/math/rounding.h",
        "max_(T(0.0), min_(T(1.0), stretched))",
        "max_(T(0.0), stretched)",
        "ops ops_kinks",
    ),
    Mutant(
        "the gradient is not stopped by the clamp",
        "csrc/cpu/loops/soft_quantize.h",
        "through_clamp(grid.scale * r.grad, code, grid)",
        "grid.scale * r.grad",
        "ops ops_kinks",
    ),
    Mutant(
        "V = 0 rounds down",
        "csrc/math/rounding.h",
        "select_(v >= T(0.0), T(1.0), T(0.0))",
        "select_(v > T(0.0), T(1.0), T(0.0))",
        "ops ops_kinks",
    ),
    Mutant(
        "the row of scales is counted in groups",
        "csrc/cpu/storage.h",
        "const int64_t row = i / cols_;",
        "const int64_t row = i / group_size_;",
        "ops",
    ),
    Mutant(
        "a run that begins within a group goes on beyond it",
        "csrc/cpu/storage.h",
        "i + (group + 1) * group_size_ - col",
        "i + group_size_",
        "ops rounding_step",
    ),
    # Chunks and threads.
    Mutant(
        "the last chunk is left out where it is not full",
        "csrc/cpu/storage.h",
        "const int64_t chunks = (numel + kChunk - 1) / kChunk;",
        "const int64_t chunks = numel / kChunk;",
        "ops",
    ),
    Mutant(
        "every thread but the first leaves out its first chunk",
        "csrc/cpu/storage.h",
        "int64_t chunk = first;",
        "int64_t chunk = first + (first > 0);",
        "ops rounding_step",
    ),
    Mutant(
        "bfloat16 is read from the beginning for every chunk",
        "csrc/cpu/storage.h",
        "static_cast<const BFloat16*>(data_) + begin",
        "static_cast<const BFloat16*>(data_)",
        "ops rounding_step",
    ),
    Mutant(
        "all threads add to one partial sum",
        "csrc/cpu/soft_quantize.cpp",
        "partial[static_cast<size_t>(chunk)] +=",
        "partial[0] +=",
        THREADS,
    ),
    Mutant(
        "chunks overlap: one element is written by two threads",
        "csrc/cpu/storage.h",
        "const int64_t begin = chunk * kChunk;",
        "const int64_t begin = chunk * kChunk - (chunk == first && first > 0);",
        THREADS,
    ),
    Mutant(
        "refine_ takes a thread's last row twice",
        "csrc/cpu/refine.cpp",
        "for (int64_t row = first; row < last; ++row) {",
        "for (int64_t row = first; row < std::min(last + 1, layout.rows); ++row) {",
        THREADS,
    ),
    Mutant(
        "rounding_step_ asks for its loops once a chunk",
        "csrc/cpu/rounding_step.cpp",
        "      kernel(\n",
        "      kernels<T>().rounding_step(\n",
        THREADS,
    ),
    # rounding_step_.
    Mutant(
        "the schedule is read beyond its last row",
        "csrc/cpu/rounding_step.cpp",
        "std::min(std::max<int64_t>(*counter, 0), last)",
        "std::max<int64_t>(*counter, 0)",
        "rounding_step",
    ),
    Mutant(
        "Adam's second moment is not corrected for its bias",
        "csrc/math/rounding.h",
        "sqrt_(exp_avg_sq) * params.inv_bias_sqrt",
        "sqrt_(exp_avg_sq)",
        "rounding_step",
    ),
    Mutant(
        "the weight is subtracted where the error was not asked for",
        "csrc/cpu/loops/rounding_step.h",
        "s.as_error ? T(1) : T(0)",
        "T(1)",
        "rounding_step",
    ),
    # refine_ and tabu_search_.
    Mutant(
        "the scale of a row is read as if it had one group",
        "csrc/arguments/search.h",
        "return row * scale_stride;",
        "return scale_stride ? row : 0;",
        "refine",
    ),
    Mutant(
        "Gram matrices are counted by rows",
        "csrc/arguments/search.h",
        "row / rows_per_gram * cols * cols",
        "row % rows_per_gram * cols * cols",
        "refine",
    ),
    Mutant(
        "a refined code may leave the grid above",
        "csrc/math/search.h",
        "return max_(qmin, min_(qmax, best));",
        "return max_(qmin, best);",
        "refine",
    ),
    Mutant(
        "equally good codes alternate",
        "csrc/math/search.h",
        "const T half_step = T(0.5) + T(1e-4);",
        "const T half_step = T(0.5) - T(1e-4);",
        "refine",
    ),
    Mutant(
        "what fills up a vector is taken for columns",
        "csrc/cpu/loops/tabu_search.h",
        "if (left < kSize<V>) {  // load()",
        "if (left + 1 < kSize<V>) {  // load()",
        "tabu_search",
    ),
    Mutant(
        "a column rests one step too long",
        "csrc/cpu/loops/tabu_search.h",
        "select_(now >= load<V>(s.free_from",
        "select_(now > load<V>(s.free_from",
        "tabu_search",
    ),
    Mutant(
        "the tabu search does not settle its last step",
        "csrc/cpu/loops/tabu_search.h",
        "step <= s.steps; ++step) {",
        "step < s.steps; ++step) {",
        "tabu_search",
    ),
    Mutant(
        "rests of the row before are not forgotten",
        "csrc/cpu/tabu_search.cpp",
        "      std::fill(free_from.begin(), free_from.end(), T(0));\n",
        "",
        "tabu_search",
    ),
    # gptq.
    Mutant(
        "the column after the rounded one is not shifted",
        "csrc/cpu/loops/gptq.h",
        "for_each_vector<V>(k + 1, s.cols,",
        "for_each_vector<V>(k + 2, s.cols,",
        "gptq",
    ),
    Mutant(
        "the last tile is taken for a full one",
        "csrc/cpu/gptq.cpp",
        "std::min(kGptqRows, rows_per_gram - begin)",
        "kGptqRows",
        "gptq",
    ),
    Mutant(
        "shifts of the tile before are kept",
        "csrc/cpu/gptq.cpp",
        "      std::fill(shift.begin(), shift.end(), T(0));\n",
        "",
        "gptq",
    ),
    Mutant(
        "groups of scales follow the order of processing",
        "csrc/cpu/gptq.cpp",
        "order[k] / layout.group_size;",
        "k / layout.group_size;",
        "gptq",
    ),
    Mutant(
        "a column may come twice in the order",
        "csrc/cpu/gptq.cpp",
        "column < cols && !seen[static_cast<size_t>(column)]",
        "column < cols",
        "gptq",
    ),
    # Packed codes.
    Mutant(
        "eight bytes are moved where fewer are left",
        "csrc/cpu/loops/pack_bits.h",
        "kWholeLane<kBits> ? 0 : (7 + kBits - 1) / kBits;",
        "0;",
        "packing",
    ),
    Mutant(
        "codes that do not fit are not noticed in full vectors",
        "csrc/cpu/loops/pack_bits.h",
        "beyond = beyond | excess<kBits>(numbers);",
        "",
        "packing",
    ),
    Mutant(
        "bits after the last code are not zero",
        "csrc/cpu/loops/pack_bits.h",
        "~uint64_t{0} >> (8 * (kBlock - count))",
        "~uint64_t{0}",
        "packing",
    ),
    Mutant(
        "every thread but the first leaves out its first block",
        "csrc/cpu/pack_bits.cpp",
        "for (int64_t block = begin; block < end;) {",
        "for (int64_t block = begin + (begin > 0); block < end;) {",
        "packing",
    ),
    Mutant(
        "the width of packed is not checked",
        "csrc/arguments/packing.h",
        "packed.dim() == 2 && packed.size(1) == packed_bytes(cols, bits),",
        "packed.dim() == 2,",
        "packing packed_linear",
    ),
    # packed_linear.
    Mutant(
        "rows beyond the last are read",
        "csrc/cpu/packed_linear.cpp",
        "std::min(first_row + i, rows_ - 1)",
        "first_row + i",
        "packed_linear",
    ),
    Mutant(
        "bytes beyond a row are read",
        "csrc/cpu/loops/packed_linear.h",
        "if (begin + kRead <= row_bytes) {",
        "if (begin + kBytes <= row_bytes) {",
        "packed_linear",
    ),
    Mutant(
        "a group begins a column too late",
        "csrc/cpu/loops/packed_linear.h",
        "column >= Vec(static_cast<float>(begin))",
        "column > Vec(static_cast<float>(begin))",
        "packed_linear",
    ),
    Mutant(
        "an odd position is left out",
        "csrc/cpu/loops/packed_linear.h",
        "    add_all_products<1>(s, begin, weight, written, sum, p);\n",
        "",
        "packed_linear",
    ),
    Mutant(
        "the second chunk of positions gets the first one's",
        "csrc/cpu/packed_linear.cpp",
        "tile.x = arranged_ + first_position * stride_;",
        "tile.x = arranged_;",
        "packed_linear",
    ),
    # Checks of arguments.
    Mutant(
        "arguments that are read may share memory with written ones",
        "csrc/arguments/checks.h",
        "    for (const NamedTensor& b : read) {\n      check_apart(*a, b);\n    }\n",
        "",
        "ops_errors",
    ),
    Mutant(
        "the last written argument may share memory with the others",
        "csrc/arguments/checks.h",
        "for (const NamedTensor* b = a + 1; b != mutated.end(); ++b) {",
        "for (const NamedTensor* b = a + 1; b + 1 < mutated.end(); ++b) {",
        "ops_errors",
    ),
    Mutant(
        "a signed grid may go to 255",
        "csrc/arguments/checks.h",
        "qmax <= (qmin < 0 ? 127 : 255)",
        "qmax <= 255",
        "ops_errors",
    ),
    Mutant(
        "strides are not looked at",
        "csrc/arguments/rounding.h",
        '    v = contiguous({"v", &v_in});\n',
        "    v = v_in;\n",
        "ops",
    ),
    Mutant(
        "every instruction set is the one in use",
        "csrc/cpu/isa/dispatch.cpp",
        "    in_use() = choice;\n",
        "",
        "library",
    ),
]

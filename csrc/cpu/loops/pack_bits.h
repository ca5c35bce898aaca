// The loops of pack_bits and unpack_bits; a part of ../isa/loops.h.

namespace adaround_ext::cpu::ADAROUND_ISA {

constexpr int64_t kWordLanes = sizeof(Words) / sizeof(uint64_t);

// kWordLanes blocks, side by side in memory, a word each. Where no lane fits, eight bytes are moved
// for each block, up to 7 too many: the caller sees that they exist, and later blocks write theirs.
template <int kBits>
ADAROUND_INLINE Words load_blocks(const uint8_t* from) {
  Words words;
  if constexpr (kWholeLane<kBits>) {
    typedef Lane<kBits> Lanes __attribute__((vector_size(kBits * kWordLanes)));
    Lanes lanes;
    memcpy(&lanes, from, sizeof lanes);
    words.x = __builtin_convertvector(lanes, Words::Native);
  } else {
    for (int i = 0; i < kWordLanes; ++i) {
      uint64_t word;
      memcpy(&word, from + i * kBits, sizeof word);
      words.x[i] = word;
    }
  }
  return words;
}

template <int kBits>
ADAROUND_INLINE void store_blocks(uint8_t* to, Words words) {
  if constexpr (kWholeLane<kBits>) {
    typedef Lane<kBits> Lanes __attribute__((vector_size(kBits * kWordLanes)));
    const Lanes lanes = __builtin_convertvector(words.x, Lanes);
    memcpy(to, &lanes, sizeof lanes);
  } else {
    for (int i = 0; i < kWordLanes; ++i) {
      const uint64_t word = words.x[i];
      memcpy(to + i * kBits, &word, sizeof word);
    }
  }
}

// How many codes of a span the vectors take: what they move too much must still be of the span.
template <int kBits>
ADAROUND_INLINE int64_t vector_codes(int64_t size) {
  const int64_t spare = kWholeLane<kBits> ? 0 : (7 + kBits - 1) / kBits;
  const int64_t blocks = size / kBlock - spare;
  return blocks < kWordLanes ? 0 : blocks / kWordLanes * kWordLanes * kBlock;
}

template <int kBits>
bool pack_span(const PackSpan& s) {
  const int64_t vectors = vector_codes<kBits>(s.size);
  Words beyond(uint64_t{0});
  for (int64_t i = 0; i < vectors; i += kWordLanes * kBlock) {
    const Words numbers = numbers_of_codes(load_blocks<8>(s.codes + i), s.qmin);
    beyond = beyond | excess<kBits>(numbers);
    store_blocks<kBits>(s.packed + i / kBlock * kBits, join_bits<kBits>(numbers));
  }
  uint64_t rest_beyond = 0;
  for (int64_t i = vectors; i < s.size; i += kBlock) {
    const int64_t count = s.size - i < kBlock ? s.size - i : kBlock;
    const uint64_t present = ~uint64_t{0} >> (8 * (kBlock - count));
    uint64_t codes = 0;
    memcpy(&codes, s.codes + i, static_cast<size_t>(count));
    const uint64_t numbers = numbers_of_codes(codes, s.qmin) & present;
    rest_beyond |= excess<kBits>(numbers);
    const uint64_t packed = join_bits<kBits>(numbers);
    memcpy(s.packed + i / kBlock * kBits, &packed, static_cast<size_t>((count * kBits + 7) / 8));
  }
  for (int64_t i = 0; i < kWordLanes; ++i) {
    rest_beyond |= beyond.x[i];
  }
  return rest_beyond == 0;
}

template <int kBits>
void unpack_span(const UnpackSpan& s) {
  const int64_t vectors = vector_codes<kBits>(s.size);
  for (int64_t i = 0; i < vectors; i += kWordLanes * kBlock) {
    const Words numbers = split_bits<kBits>(load_blocks<kBits>(s.packed + i / kBlock * kBits));
    store_blocks<8>(s.codes + i, codes_of_numbers(numbers, s.qmin));
  }
  for (int64_t i = vectors; i < s.size; i += kBlock) {
    const int64_t count = s.size - i < kBlock ? s.size - i : kBlock;
    uint64_t packed = 0;
    memcpy(&packed, s.packed + i / kBlock * kBits, static_cast<size_t>((count * kBits + 7) / 8));
    const uint64_t codes = codes_of_numbers(split_bits<kBits>(packed), s.qmin);
    memcpy(s.codes + i, &codes, static_cast<size_t>(count));
  }
}

inline bool pack(const PackSpan& s) {
  return with_bits(s.bits, [&](auto bits) ADAROUND_INLINE_LAMBDA {
    return pack_span<decltype(bits)::value>(s);
  });
}

inline void unpack(const UnpackSpan& s) {
  with_bits(
      s.bits, [&](auto bits) ADAROUND_INLINE_LAMBDA { unpack_span<decltype(bits)::value>(s); });
}

}  // namespace adaround_ext::cpu::ADAROUND_ISA

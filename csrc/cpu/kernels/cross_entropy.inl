// cross_entropy by the families of rows, short rows and planes.

// From the problem to the instance: the terms and the type of the probabilities. Calls f(Instance<...>{}).
template <Terms terms, typename P, bool mapped>
struct Instance {
  static constexpr Terms kTerms = terms;
  static constexpr bool kMapped = mapped;
  using Probability = P;
};
template <typename T, bool kMapped, typename F>
NLLX_INLINE void with_terms(const Targets& t, const F& f) {
  using acc = typename AccOf<T>::type;
  if (!t.index) {
    t.probabilities_are_acc ? f(Instance<Terms::kProbabilities, acc, kMapped>{})
                            : f(Instance<Terms::kProbabilities, T, kMapped>{});
  } else if (t.label_smoothing == 0) {
    f(Instance<Terms::kNone, acc, kMapped>{});
  } else if constexpr (kMapped) {
    f(Instance<Terms::kAnySmoothing, acc, kMapped>{});
  } else {
    t.weight ? f(Instance<Terms::kWeighted, acc, kMapped>{}) : f(Instance<Terms::kUniform, acc, kMapped>{});
  }
}
template <typename T, typename Problem, typename F>
NLLX_INLINE void with_instance(const Problem& p, const F& f) {
  p.options&& p.options->map_logits() ? with_terms<T, true>(p.targets, f) : with_terms<T, false>(p.targets, f);
}

// Mapped, only those that vectors over the rows take: fewer instances.
template <typename T, Terms kTerms, bool kMapped, typename Problem>
NLLX_INLINE bool takes_short_rows(const Problem& p) {
  if (kMapped && (kTerms == Terms::kProbabilities || !has_few_classes(p.extent.classes))) return false;
  return has_short_rows<typename AccOf<T>::type>(p.layout, p.extent);
}

template <typename T>
void cross_entropy_forward(const CrossEntropyForward& p, const Chunks& chunks, int64_t chunk, ChunkResult& result) {
  with_instance<T>(p, [&](auto instance) {
    constexpr Terms kTerms = decltype(instance)::kTerms;
    constexpr bool kMapped = decltype(instance)::kMapped;
    using P = typename decltype(instance)::Probability;
    if (p.layout == Layout::kPlanes) {
      cross_entropy_forward_planes<T, kTerms, P, kMapped>(p, chunks, chunk, result);
    } else if (takes_short_rows<T, kTerms, kMapped>(p)) {
      if constexpr (!kMapped || kTerms != Terms::kProbabilities) {
        cross_entropy_forward_short_rows<T, kTerms, P, kMapped>(p, chunks, chunk, result);
      }
    } else {
      cross_entropy_forward_rows<T, kTerms, P, kMapped>(p, chunks, chunk, result);
    }
  });
}
template <typename T>
void cross_entropy_forward_segment(const CrossEntropyForward& p, const Chunks& chunks, int64_t unit, RowPart& part) {
  with_instance<T>(p, [&](auto instance) {
    using I = decltype(instance);
    sum_row_segment<T, I::kTerms, typename I::Probability, I::kMapped>(p, chunks, unit, part);
  });
}
template <typename T>
void cross_entropy_forward_merge(const CrossEntropyForward& p, int64_t row, const RowPart* parts, int64_t count,
                                 ChunkResult& result) {
  with_instance<T>(p, [&](auto instance) {
    using I = decltype(instance);
    merge_row_segments<T, I::kTerms, typename I::Probability, I::kMapped>(p, row, parts, count, result);
  });
}
template <typename T>
void cross_entropy_backward(const CrossEntropyBackward& p, const Chunks& chunks, int64_t chunk, ChunkResult& result) {
  with_instance<T>(p, [&](auto instance) {
    constexpr Terms kTerms = decltype(instance)::kTerms;
    constexpr bool kMapped = decltype(instance)::kMapped;
    using P = typename decltype(instance)::Probability;
    if (p.layout == Layout::kPlanes) {
      cross_entropy_backward_planes<T, kTerms, P, kMapped>(p, chunks, chunk, result);
    } else if (takes_short_rows<T, kTerms, kMapped>(p)) {
      if constexpr (!kMapped || kTerms != Terms::kProbabilities) {
        cross_entropy_backward_short_rows<T, kTerms, P, kMapped>(p, chunks, chunk, result);
      }
    } else {
      cross_entropy_backward_rows<T, kTerms, P, kMapped>(p, chunks, chunk, result);
    }
  });
}

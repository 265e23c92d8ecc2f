// cross_entropy by the families of rows, short rows and planes.

// From the problem to the instance: the terms and the type of the probabilities. Calls f(Instance<...>{}).
template <Terms terms, typename P>
struct Instance {
  static constexpr Terms kTerms = terms;
  using Probability = P;
};
template <typename T, typename F>
NLLX_INLINE void with_instance(const Targets& t, const F& f) {
  using acc = typename AccOf<T>::type;
  if (!t.index) {
    t.probabilities_are_acc ? f(Instance<Terms::kProbabilities, acc>{}) : f(Instance<Terms::kProbabilities, T>{});
  } else if (t.label_smoothing > 0) {
    t.weight ? f(Instance<Terms::kWeighted, acc>{}) : f(Instance<Terms::kUniform, acc>{});
  } else {
    f(Instance<Terms::kNone, acc>{});
  }
}

template <typename T>
void cross_entropy_forward(const CrossEntropyForward& p, const Chunks& chunks, int64_t chunk, ChunkResult& result) {
  with_instance<T>(p.targets, [&](auto instance) {
    constexpr Terms kTerms = decltype(instance)::kTerms;
    using P = typename decltype(instance)::Probability;
    if (p.layout == Layout::kPlanes) {
      cross_entropy_forward_planes<T, kTerms, P>(p, chunks, chunk, result);
    } else if (has_short_rows<typename AccOf<T>::type>(p.layout, p.extent)) {
      cross_entropy_forward_short_rows<T, kTerms, P>(p, chunks, chunk, result);
    } else {
      cross_entropy_forward_rows<T, kTerms, P>(p, chunks, chunk, result);
    }
  });
}
template <typename T>
void cross_entropy_forward_segment(const CrossEntropyForward& p, const Chunks& chunks, int64_t unit, RowPart& part) {
  with_instance<T>(p.targets, [&](auto instance) {
    sum_row_segment<T, decltype(instance)::kTerms, typename decltype(instance)::Probability>(p, chunks, unit, part);
  });
}
template <typename T>
void cross_entropy_forward_merge(const CrossEntropyForward& p, int64_t row, const RowPart* parts, int64_t count,
                                 ChunkResult& result) {
  with_instance<T>(p.targets, [&](auto instance) {
    merge_row_segments<T, decltype(instance)::kTerms, typename decltype(instance)::Probability>(p, row, parts, count,
                                                                                                result);
  });
}
template <typename T>
void cross_entropy_backward(const CrossEntropyBackward& p, const Chunks& chunks, int64_t chunk, ChunkResult& result) {
  with_instance<T>(p.targets, [&](auto instance) {
    constexpr Terms kTerms = decltype(instance)::kTerms;
    using P = typename decltype(instance)::Probability;
    if (p.layout == Layout::kPlanes) {
      cross_entropy_backward_planes<T, kTerms, P>(p, chunks, chunk, result);
    } else if (has_short_rows<typename AccOf<T>::type>(p.layout, p.extent)) {
      cross_entropy_backward_short_rows<T, kTerms, P>(p, chunks, chunk, result);
    } else {
      cross_entropy_backward_rows<T, kTerms, P>(p, chunks, chunk, result);
    }
  });
}

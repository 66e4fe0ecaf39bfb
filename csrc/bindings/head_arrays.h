// Arrays and dicts to the sequential head's inputs and back; shared by the two test submodules that drive heads.
#pragma once

#include "sequential_head.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

namespace dspark {

using FloatArray = pybind11::array_t<float, pybind11::array::c_style | pybind11::array::forcecast>;

template <class T> pybind11::array_t<T> to_array(const std::vector<T>& values) {
    return pybind11::array_t<T>(static_cast<pybind11::ssize_t>(values.size()), values.data());
}

inline pybind11::tuple to_tuple(const Distribution& d) {
    return pybind11::make_tuple(to_array(d.ids), to_array(d.probs));
}

template <class T> void read(const pybind11::dict& from, const char* key, T& into) {
    if (from.contains(key)) {
        into = from[key].cast<T>();
    }
}

// Everything of HeadWeights; `table(key)` makes the RowTable of a matrix, empty where the key is absent.
template <class Table> HeadWeights read_head_weights(const pybind11::dict& from, Table&& table) {
    const auto type = from["type"].cast<std::string>();
    HeadWeights weights;
    weights.type = type == "vanilla" ? MarkovHeadType::vanilla
                   : type == "gated" ? MarkovHeadType::gated
                   : type == "rnn"   ? MarkovHeadType::rnn
                                     : MarkovHeadType::none;
    read(from, "n_vocab", weights.n_vocab);
    read(from, "hidden_size", weights.hidden_size);
    read(from, "rank", weights.rank);
    read(from, "gate_bias", weights.gate_bias);
    read(from, "joint_bias", weights.joint_bias);
    read(from, "d2t", weights.d2t);
    read(from, "logit_softcap", weights.logit_softcap);
    weights.w1 = table("w1");
    weights.w2 = table("w2");
    weights.gate = table("gate");
    weights.joint = table("joint");
    if (from.contains("confidence")) {
        weights.confidence.emplace(from["confidence"].cast<std::vector<float>>(), from["confidence_bias"].cast<float>(),
                                   weights.hidden_size, weights.rank);
    }
    return weights;
}

// One request's arrays, kept alive beside the input that points into them.
struct HeldInput {
    FloatArray base_logits; // (n_slots, n_vocab)
    FloatArray hidden;      // (n_slots, hidden_size)
    std::vector<const float*> base_rows;
    std::vector<const float*> hidden_rows;
    std::vector<Candidates> candidates;
    SamplingOptions sampling;
    TokenCounts counts;
    BlockInput input;
};

inline void hold_rows(const pybind11::dict& from, const char* key, FloatArray& array, std::vector<const float*>& rows) {
    if (from.contains(key)) {
        array = from[key].cast<FloatArray>();
        for (pybind11::ssize_t row = 0; row < array.shape(0); ++row) {
            rows.push_back(array.data(row, 0));
        }
    }
}

// The block itself: rows, candidates, anchor and start. Truncation and random stream are the caller's.
inline void hold_block(const pybind11::dict& from, HeldInput& held) {
    hold_rows(from, "hidden", held.hidden, held.hidden_rows);
    hold_rows(from, "base_logits", held.base_logits, held.base_rows);
    if (from.contains("candidates")) {
        for (auto& [ids, logits] :
             from["candidates"].cast<std::vector<std::pair<std::vector<int32_t>, std::vector<float>>>>()) {
            held.candidates.push_back({ids, logits});
        }
    }
    held.input.base_logits = held.base_rows;
    held.input.hidden = held.hidden_rows;
    held.input.candidates = held.candidates;
    read(from, "anchor", held.input.anchor);
    read(from, "start", held.input.start);
}

} // namespace dspark

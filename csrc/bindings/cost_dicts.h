// Cost curves to the dict that Python sees and back; shared by the engine's bindings and the scheduler's test module.
#pragma once

#include "cost_table.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace dspark {

inline pybind11::dict curves_to_dict(const CostCurves& curves) {
    pybind11::dict dict;
    dict["verify"] = curves.verify;
    dict["plain"] = curves.plain;
    dict["prefill"] = curves.prefill;
    dict["draft"] = curves.draft;
    dict["inject"] = curves.inject;
    dict["verify_ms_per_row_cell"] = curves.verify_ms_per_row_cell;
    dict["draft_ms_per_block_cell"] = curves.draft_ms_per_block_cell;
    return dict;
}

// Throws std::invalid_argument and pybind11's errors.
inline CostCurves curves_from_dict(const pybind11::dict& dict) {
    CostCurves curves{dict["verify"].cast<CostPoints>(),
                      dict.contains("plain") ? dict["plain"].cast<CostPoints>() : CostPoints(),
                      dict["prefill"].cast<CostPoints>(),
                      dict["draft"].cast<CostPoints>(),
                      dict["inject"].cast<CostPoints>(),
                      dict["verify_ms_per_row_cell"].cast<double>(),
                      dict["draft_ms_per_block_cell"].cast<double>()};
    curves.validate();
    return curves;
}

} // namespace dspark

"""Which tests decide over a mutant of which file; those that find most stand first."""

from __future__ import annotations

_KNOWN = "harness/tests/judge/known"  # answers worked out by hand
_JUDGE, _CLAIMS = "harness/tests/judge", "harness/tests/judge/claims"
_HISTORY = "harness/tests/judge/history"
_OF_RUNS = (
    f"{_KNOWN}/test_runs.py",
    f"{_KNOWN}/test_identity.py",
    f"{_CLAIMS}/test_run.py",
    f"{_CLAIMS}/test_verdicts.py",
)
_OF_ABLATIONS = (f"{_JUDGE}/test_ablation.py",)
_OF_SWEEPS = (f"{_KNOWN}/test_sweeps.py", f"{_CLAIMS}/test_sweep.py", "harness/tests/report/test_sweep.py")
_OF_FIGURES = (
    f"{_KNOWN}/test_figures.py",
    f"{_JUDGE}/test_metrics.py",
    *_OF_RUNS,
    "harness/tests/report/test_run.py",
)
_OF_FILES = (
    f"{_KNOWN}/test_exact_faults.py",
    f"{_KNOWN}/test_sound_records.py",
    f"{_JUDGE}/validate/test_record.py",
)
_OF_GRIDS = (f"{_KNOWN}/test_grids.py", "harness/tests/compose/test_curve.py")

TESTS: dict[str, tuple[str, ...]] = {
    "harness/compose/replay.py": (
        "harness/tests/compose/test_replay.py",
        "harness/tests/compose/test_composer.py",
    ),
    "harness/judge/ablation.py": _OF_ABLATIONS,
    "harness/judge/anatomy/acceptance.py": ("harness/tests/judge/anatomy/test_acceptance.py",),
    "harness/judge/anatomy/oracle.py": ("harness/tests/judge/anatomy/test_oracle.py",),
    "harness/judge/checks.py": (
        f"{_KNOWN}/test_edges_of_forms.py",
        f"{_KNOWN}/test_findings_of_checks.py",
        f"{_KNOWN}/test_edges_of_checks.py",
        f"{_JUDGE}/test_checks.py",
        f"{_JUDGE}/test_speed_checks.py",
        "harness/tests/report/test_run.py",
    ),
    "harness/judge/claims/ablation.py": (f"{_KNOWN}/test_trainings.py", *_OF_ABLATIONS),
    "harness/judge/claims/ablation_parts.py": (f"{_KNOWN}/test_trainings.py", *_OF_ABLATIONS),
    "harness/judge/claims/trees.py": (
        f"{_KNOWN}/test_curves_and_losses.py",
        f"{_KNOWN}/test_growth.py",
        *_OF_RUNS,
        f"{_CLAIMS}/test_planted.py",
    ),
    "harness/judge/claims/evidence.py": (f"{_KNOWN}/test_curves_and_losses.py", *_OF_RUNS, *_OF_ABLATIONS),
    "harness/judge/claims/findings.py": (
        f"{_KNOWN}/test_intervals.py",
        f"{_CLAIMS}/test_power.py",
        f"{_KNOWN}/test_edges_of_forms.py",
        *_OF_RUNS,
        *_OF_SWEEPS,
    ),
    "harness/judge/claims/heads.py": (
        f"{_KNOWN}/test_curves_and_losses.py",
        *_OF_RUNS,
        *_OF_ABLATIONS,
        f"{_CLAIMS}/test_planted.py",
    ),
    "harness/judge/claims/literal.py": (f"{_CLAIMS}/test_literal.py",),
    "harness/judge/claims/paper.py": (
        f"{_KNOWN}/test_papers_arithmetic.py",
        f"{_KNOWN}/test_edges_of_forms.py",
        f"{_CLAIMS}/test_paper.py",
        *_OF_RUNS,
        *_OF_SWEEPS,
    ),
    "harness/judge/claims/run.py": (*_OF_RUNS, f"{_CLAIMS}/test_planted.py"),
    "harness/judge/claims/standing.py": (f"{_KNOWN}/test_standings.py", f"{_CLAIMS}/test_standing.py"),
    "harness/judge/claims/sweep.py": _OF_SWEEPS,
    "harness/judge/claims/verdicts.py": (*_OF_RUNS, f"{_CLAIMS}/test_sweep.py"),
    "harness/judge/gate/exact.py": (f"{_JUDGE}/gate/test_exact.py",),
    "harness/judge/gate/looks.py": (f"{_JUDGE}/gate/test_looks.py", f"{_JUDGE}/gate/test_timed.py"),
    "harness/judge/gate/timed.py": (
        f"{_JUDGE}/gate/test_timed.py",
        "harness/tests/gate/test_simulate.py",
        "harness/tests/gate/test_results.py",
    ),
    "harness/judge/validate/gate.py": (f"{_JUDGE}/validate/test_gate.py",),
    "harness/judge/history/bands.py": (f"{_HISTORY}/test_bands.py", f"{_HISTORY}/test_compare.py"),
    "harness/judge/history/comparable.py": (f"{_HISTORY}/test_comparable.py", f"{_HISTORY}/test_series.py"),
    "harness/judge/history/compare.py": (f"{_HISTORY}/test_compare.py",),
    "harness/judge/history/figures.py": (f"{_HISTORY}/test_compare.py",),
    "harness/judge/history/provenance.py": (f"{_HISTORY}/test_provenance.py",),
    "harness/judge/history/series.py": (f"{_HISTORY}/test_series.py",),
    "harness/judge/history/steps.py": (f"{_HISTORY}/test_steps.py", f"{_HISTORY}/test_series.py"),
    "harness/judge/history/texts.py": (f"{_HISTORY}/test_compare.py",),
    "harness/judge/history/valid.py": (f"{_HISTORY}/test_valid.py",),
    "harness/judge/judgement.py": (
        f"{_JUDGE}/test_withheld.py",
        f"{_KNOWN}/test_findings_of_checks.py",
        f"{_KNOWN}/test_edges_of_checks.py",
        "harness/tests/report/test_run.py",
        *_OF_RUNS,
    ),
    "harness/judge/latency.py": _OF_GRIDS,
    "harness/judge/latency_checks.py": ("harness/tests/measure/latency/test_disturbed.py",),
    "harness/judge/limits.py": (f"{_KNOWN}/test_limits.py",),
    "harness/judge/metrics.py": (f"{_JUDGE}/test_withheld.py", *_OF_FIGURES),
    "harness/judge/parity.py": (
        f"{_KNOWN}/test_known_steps.py",
        f"{_JUDGE}/test_parity.py",
        f"{_JUDGE}/test_checks.py",
        f"{_JUDGE}/test_speed_checks.py",
        *_OF_RUNS,
    ),
    "harness/judge/run.py": (f"{_KNOWN}/test_judgements.py", "harness/tests/test_committed_record.py"),
    "harness/judge/schemas.py": (f"{_KNOWN}/test_grids.py", *_OF_FILES),
    "harness/judge/step_costs.py": (
        f"{_KNOWN}/test_bandwidth.py",
        f"{_JUDGE}/test_speed_checks.py",
        *_OF_FIGURES,
    ),
    "harness/judge/sweep.py": _OF_SWEEPS,
    "harness/judge/totals.py": _OF_FIGURES,
    "harness/judge/validate/ablation.py": (*_OF_FILES, *_OF_ABLATIONS),
    "harness/judge/validate/faults.py": (*_OF_FILES, *_OF_GRIDS),
    "harness/judge/validate/gpu.py": ("harness/tests/judge/validate/test_gpu.py",),
    "harness/judge/validate/latency.py": (*_OF_FILES, *_OF_GRIDS),
    "harness/judge/validate/record.py": _OF_FILES,
    "harness/judge/validate/run.py": _OF_FILES,
    "harness/judge/validate/sweep.py": (*_OF_FILES, *_OF_SWEEPS),
    "harness/stats.py": (
        f"{_KNOWN}/test_intervals.py",
        "harness/tests/test_stats.py",
        "harness/tests/records/test_disturbance.py",
        "harness/tests/test_groups.py",
        f"{_CLAIMS}/test_power.py",
        f"{_JUDGE}/test_metrics.py",
        *_OF_RUNS,
    ),
}

# Minutes of committed records, starts of other processes, and clocks: what they see, faster tests see too.
LEFT_OUT = (
    "the_readme_shows_the_committed",
    "committed_ablations_are_whole",
    "need_no_torch",
    "figures_are_drawn",
    "whenever_it_is_drawn",
)


def deciding_tests(file: str) -> tuple[str, ...]:
    """Return the files of tests that run for a mutant of a file, in that order."""
    return (*TESTS[file], f"{_KNOWN}/test_frozen.py")

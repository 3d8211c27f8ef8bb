"""Arms x seeds: trained, scored and compared."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "ablation": ["ablate", "weights_of"],
        "compare": ["Comparison"],
        "figures": ["left_out_figure"],
        "job": ["list_jobs"],
        "report": ["write_comparison", "write_report"],
        "results": ["EvaluationKey", "ResultsTable", "RunScores"],
        "runner": ["run_study"],
        "statistics": ["ComparisonDesign", "compare_arms"],
    },
)

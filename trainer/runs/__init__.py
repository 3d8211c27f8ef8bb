"""The run directory: written, opened, exported."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "adapter": ["Adapter", "load_adapter"],
        "adapter_export": ["Export", "export_adapter"],
        "checkpoint": [
            "Checkpoint",
            "DamagedError",
            "latest_checkpoint",
            "list_checkpoints",
            "save_checkpoint",
        ],
        "compatibility": ["check_features", "check_llm"],
        "export": ["export_router", "load_router"],
        "figures": ["make_figures", "plot_run"],
        "metrics": ["add_line", "read_metrics", "trim_metrics"],
        "noise_level": ["open_estimator"],
        "record": ["build_model", "find_run", "read_record", "write_record"],
        "run": ["Run", "load_run", "open_run"],
        "scores": ["Evaluation", "EvaluationReport"],
        "start": ["open_start", "start_from"],
    },
)

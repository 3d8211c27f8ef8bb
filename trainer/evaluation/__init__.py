"""Images generated and scored."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "diffusers_pipeline": ["SemanticRoutingPipeline", "export_pipeline"],
        "generate": ["draw"],
        "image_set": ["draw_gallery", "find_shard", "finish_gallery", "open_gallery"],
        "lag": ["Lag", "measure_lag", "report_lag"],
        "shapes": ["chance", "evaluate", "interval", "score_run"],
        "vqascore": ["Judge", "default_dtype", "judge_pictures"],
    },
)

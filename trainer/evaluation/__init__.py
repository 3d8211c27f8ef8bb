"""Images generated and scored."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "diffusers_pipeline": ["SemanticRoutingPipeline", "export_pipeline"],
        "generate": ["generate_samples"],
        "image_set": ["generate_image_set", "find_shard", "finish_image_set", "open_image_set"],
        "lag": ["TrajectoryMismatch", "measure_lag", "report_lag"],
        "shapes": ["chance", "evaluate", "interval", "score_run"],
        "vqascore": ["VQAScorer", "default_dtype", "score_images"],
    },
)

"""Images generated and scored."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "attach": ["attach", "detach"],
        "diffusers_pipeline": ["SemanticRoutingPipeline", "export_pipeline"],
        "embed": ["Embeds", "embed", "read_embeds"],
        "generate": [
            "CaptionSet",
            "captions_of_file",
            "encoded_captions",
            "generate_samples",
            "open_encoder",
            "stored_captions",
        ],
        "image_set": ["find_shard", "finish_image_set", "generate_image_set", "open_image_set"],
        "lag": ["TrajectoryMismatch", "measure_lag", "report_lag"],
        "shapes": ["chance", "interval", "read_captions", "score", "score_each_image", "score_run"],
        "vqascore": ["VQAScorer", "VQAScores", "default_dtype", "score_images"],
    },
)

from tiny_tokenizers import loaded, places

__all__ = ["loaded", "places"]

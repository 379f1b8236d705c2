"""MTP heads: families, the module, the unroll, loading. Knows how engines draft, and nothing of losses."""

"""Models: one transformer core, four checkpoint layouts, adapters."""

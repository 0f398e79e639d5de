"""From a selection to a compact model: in memory or straight from the disk."""

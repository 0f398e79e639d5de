"""What a sub-network looks like: its units layer by layer, drawn as SVG."""

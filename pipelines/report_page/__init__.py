"""The page of `vectormill report`: one HTML file with its charts as inline SVG, without scripts or outside resources."""

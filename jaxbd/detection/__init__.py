"""From searched triggers to a verdict, and detectors of triggered images at test time."""

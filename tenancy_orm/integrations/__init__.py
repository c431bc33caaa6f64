"""One small module per framework. Each needs the extra that is named like it."""

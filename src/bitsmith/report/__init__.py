"""Results as a person reads them: terminal tables and one self-contained HTML page."""

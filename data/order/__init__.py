"""In which order training sees the samples: ``orders`` (global, or by blocks of a cold disk), ``balanced`` by class."""

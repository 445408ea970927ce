"""Where zeros are of use: runtimes, by their documentation, and files."""

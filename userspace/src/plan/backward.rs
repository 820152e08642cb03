//! From applications to levels.

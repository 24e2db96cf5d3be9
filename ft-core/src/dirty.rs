//! Set of dirty pages.
pub struct DirtySet;

use super::*;
use anyhow::Result;
pub fn check(settings: Settings) -> Result<()> {
    let _lab = Lab::up(settings)?;
    Ok(())
}

//! `qjump testbed`.
use clap::Args;
use super::Failure;
/// Racks of network namespaces on this machine
#[derive(Args)]
pub struct TestbedCommand {}
impl TestbedCommand { pub(super) fn run(&self) -> Result<(), Failure> { Ok(()) } }

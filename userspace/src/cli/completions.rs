//! What is made from the definition of the command line itself, and the schema of the configuration: `qjump completions`, `qjump
//! man` and `qjump schema`. `cargo xtask dist` puts them into packages.

use std::{fs, path::PathBuf};

use clap::{Args, Command};
use clap_complete::Shell;

use super::{Failure, print};
use crate::config::SCHEMA;

/// Print what completes qjump's command line in a shell
#[derive(Args)]
pub struct CompletionsCommand {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

/// Write manual pages, one a command, into a folder
#[derive(Args)]
pub struct ManCommand {
    /// The folder; it must be there
    folder: PathBuf,
}

/// Print the JSON Schema of the configuration file, for editors and checks
#[derive(Args)]
pub struct SchemaCommand {}

impl CompletionsCommand {
    pub(super) fn run(&self, mut definition: Command) -> Result<(), Failure> {
        let mut text = Vec::new();
        clap_complete::generate(self.shell, &mut definition, "qjump", &mut text);
        print(String::from_utf8_lossy(&text).trim_end())
    }
}

impl ManCommand {
    pub(super) fn run(&self, mut definition: Command) -> Result<(), Failure> {
        definition.build();
        self.write(&definition)
    }

    /// The page of a command, and those of the commands below it: qjump-testbed-run.1. clap joins names with dashes.
    fn write(&self, command: &Command) -> Result<(), Failure> {
        let mut page = Vec::new();
        clap_mangen::Man::new(command.clone()).render(&mut page)?;
        let name = command.get_display_name().unwrap_or(command.get_name());
        let path = self.folder.join(format!("{name}.1"));
        fs::write(&path, page).map_err(|error| Failure::Failed(format!("cannot write {}: {error}", path.display())))?;
        let shown = |command: &&Command| !command.is_hide_set() && command.get_name() != "help";
        command.get_subcommands().filter(shown).try_for_each(|below| self.write(below))
    }
}

impl SchemaCommand {
    pub(super) fn run(&self) -> Result<(), Failure> {
        print(SCHEMA.trim_end())
    }
}

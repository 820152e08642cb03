//! What the kernel makes of the eBPF object: tried, not guessed, and nothing of it stays.

use std::io;

use aya::{
    Ebpf,
    programs::{
        LinkOrder, TcAttachType,
        tc::{self, NlOptions, TcAttachOptions},
    },
};

use super::{
    Error,
    error::shorten,
    load::{FILTER_HANDLE, FILTER_PRIORITY, loader, program},
    object::{has_compare_exchange, object},
};
use crate::{qdisc, tag::grants};

/// What the kernel takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trial {
    /// Whether eBPF has a compare-exchange.
    pub compare_exchange: bool,
    /// The egress program.
    pub egress: Result<(), String>,
    /// The programs for cgroups that it refuses, and why.
    pub refused: Vec<(&'static str, String)>,
    /// Attaching to tcx.
    pub tcx: Result<(), String>,
    /// Attaching to clsact.
    pub clsact: Result<(), String>,
}

/// Loads the object's programs, attached to nothing, and attaches the egress program in a network namespace of its
/// own, which goes away with it. Nothing is pinned.
///
/// # Errors
/// [`Error::NoObject`] if there is none.
pub fn trial() -> Result<Trial, Error> {
    let mut object = match loader().load(object()?) {
        Ok(object) => object,
        Err(error) => return Ok(Trial::refused(&shorten(&error))),
    };
    let egress = program(&mut object)?.load().map_err(|error| shorten(&error));
    let [tcx, clsact] = match &egress {
        Ok(()) => try_hooks(&mut object),
        Err(why) => [Err(why.clone()), Err(why.clone())],
    };
    let refused = grants::refused_programs(object);
    Ok(Trial { compare_exchange: has_compare_exchange(), egress, refused, tcx, clsact })
}

impl Trial {
    fn refused(why: &str) -> Self {
        let no = || Err(why.to_owned());
        let compare_exchange = has_compare_exchange();
        Self { compare_exchange, egress: no(), refused: Vec::new(), tcx: no(), clsact: no() }
    }
}

fn try_hooks(object: &mut Ebpf) -> [Result<(), String>; 2] {
    let tried = qdisc::scratch(|_| {
        let mut attach = |options| -> Result<(), String> {
            let program = program(object).map_err(|error| error.to_string())?;
            // What it is attached to goes with the namespace.
            program.attach_with_options("lo", TcAttachType::Egress, options).map(drop).map_err(|error| shorten(&error))
        };
        let tcx = attach(TcAttachOptions::TcxOrder(LinkOrder::first()));
        let options = NlOptions { priority: FILTER_PRIORITY, handle: FILTER_HANDLE, classid: None };
        let clsact = tc::qdisc_add_clsact("lo").map_err(|error| shorten(&error));
        let clsact = clsact.and_then(|()| attach(TcAttachOptions::Netlink(options)));
        Ok([tcx, clsact])
    });
    tried.unwrap_or_else(|error: io::Error| {
        let why = format!("no network namespace to try it in: {error}");
        [Err(why.clone()), Err(why)]
    })
}

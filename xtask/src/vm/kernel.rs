//! The kernels of the guests: Debian's, for virtual machines.

use super::packages::Mirror;
use crate::{process, say};
use anyhow::{Context, bail, ensure};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The series that the matrix has, the oldest first. The last one is whatever is newest.
pub const SERIES: [&str; 5] = ["5.10", "6.1", "6.12", "6.18", NEWEST];
/// The name for the newest kernel there is, of whatever series.
pub const NEWEST: &str = "newest";

/// What the C library calls ENOSPC: another kernel would have no room either.
const FULL: &str = "No space left on device";

const IMAGE: &str = "linux-image-";
const FLAVOUR: &str = "-cloud-amd64";

/// The modules that tests and racks need, if the kernel has them: all have not all.
const MODULES: &[&str] = &[
    "8021q",
    "act_gact",
    "act_mirred",
    "bonding",
    "bridge",
    "cls_bpf",
    "cls_matchall",
    "cls_u32",
    "dummy",
    "ifb",
    "inet_diag",
    "macvlan",
    "netkit",
    "nf_tables",
    "packet_diag",
    "sch_etf",
    "sch_fq",
    "sch_fq_codel",
    "sch_htb",
    "sch_ingress",
    "sch_mqprio",
    "sch_netem",
    "sch_prio",
    "sch_red",
    "sch_sfq",
    "sch_tbf",
    "tcp_bbr",
    "tcp_dctcp",
    "tcp_diag",
    "tun",
    "udp_diag",
    "veth",
    "virtio_net",
    "virtio_pci",
    "xsk_diag",
];

/// A kernel that was fetched.
#[derive(Debug)]
pub struct Kernel {
    /// The series it was fetched for.
    pub series: String,
    /// What `uname -r` says.
    pub release: String,
    folder: PathBuf,
}

impl Kernel {
    /// Finds the newest kernel of a series: among those fetched before, or, if there is none or `refresh` is asked
    /// for, on the mirror.
    pub fn find(series: &str, vm: &Path, refresh: bool) -> anyhow::Result<Self> {
        let kernels = vm.join("kernels");
        let cached = fetched(series, vm)?;
        let release = match (cached, refresh) {
            (Some(release), false) => release,
            (cached, _) => match fetch(series, vm) {
                Ok(release) => release,
                Err(error) => match cached {
                    Some(release) => {
                        say!("cannot look for a newer kernel {series}: {error:#}; going on with {release}");
                        release
                    }
                    None => return Err(error.context(format!("cannot get a kernel {series}"))),
                },
            },
        };
        Ok(Self { series: series.to_owned(), folder: kernels.join(&release), release })
    }

    /// A kernel that is nowhere.
    #[cfg(test)]
    pub fn of(series: &str, release: &str) -> Self {
        Self { series: series.to_owned(), release: release.to_owned(), folder: PathBuf::new() }
    }

    /// The kernel itself.
    pub fn image(&self) -> PathBuf {
        let old = self.folder.join(format!("boot/vmlinuz-{}", self.release));
        // Since 6.19.
        let new = self.folder.join(format!("usr/lib/modules/{}/vmlinuz", self.release));
        if old.is_file() { old } else { new }
    }

    /// The modules that guests need, unpacked, in an order in which they can be loaded: name and content.
    pub fn modules(&self) -> anyhow::Result<Vec<(String, Vec<u8>)>> {
        let root = ["lib", "usr/lib"].iter().map(|lib| self.folder.join(lib).join("modules").join(&self.release));
        let root = root.into_iter().find(|path| path.is_dir()).context("the kernel's package has no modules")?;
        let mut files = Vec::new();
        module_files(&root, &mut files)?;
        let mut loaded = BTreeSet::new();
        let mut modules = Vec::new();
        for name in MODULES {
            load_order(name, &files, &mut loaded, &mut modules)?;
        }
        Ok(modules)
    }
}

/// Fetches the newest kernel of a series that can be had.
fn fetch(series: &str, vm: &Path) -> anyhow::Result<String> {
    ensure!(cfg!(target_arch = "x86_64"), "guests are x86-64 machines, and this is none");
    let mirror = Mirror::new(vm.join("apt"))?;
    mirror.update().map_err(anyhow::Error::msg).context("cannot fetch Debian's lists of packages")?;
    let names = mirror.names("linux-")?;
    let releases = names.iter().filter_map(|name| name.strip_prefix(IMAGE));
    let mut reason = anyhow::anyhow!("the mirror has no package {IMAGE}{series}…{FLAVOUR}");
    for release in newest_first(series, releases) {
        // Since 6.19 the package of this name has nothing in it: two others have the kernel and its modules.
        let parts = ["binary", "modules"].map(|part| format!("linux-{part}-{release}"));
        let packages = match names.contains(&parts[1]) {
            true => parts.to_vec(),
            false => vec![format!("{IMAGE}{release}")],
        };
        say!("fetching {}", packages.join(" and "));
        // A folder of another name until it is whole: an interrupted fetch leaves nothing that looks like a kernel.
        let partial = vm.join("partial").join(&release);
        let _ = fs::remove_dir_all(&partial);
        match mirror.unpack(&packages, &partial) {
            Ok(()) => {
                let kernels = vm.join("kernels");
                fs::create_dir_all(&kernels)?;
                fs::rename(&partial, kernels.join(&release))
                    .with_context(|| format!("cannot keep the kernel in {}", kernels.display()))?;
                return Ok(release);
            }
            Err(error) => {
                if error.contains(FULL) {
                    let _ = fs::remove_dir_all(&partial);
                    bail!("{error}; make room where {} is", vm.display());
                }
                say!("{release} cannot be had: {error}; trying the next one of the series");
                let _ = fs::remove_dir_all(&partial);
                reason = anyhow::anyhow!(error);
            }
        }
    }
    Err(reason)
}

/// The newest kernel of a series that was fetched before.
pub fn fetched(series: &str, vm: &Path) -> anyhow::Result<Option<String>> {
    let Ok(entries) = fs::read_dir(vm.join("kernels")) else { return Ok(None) };
    let releases = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let releases = releases.collect::<anyhow::Result<Vec<String>>>()?;
    // Whichever was fetched last is the newest only if it was fetched as that, and not for a series of its own.
    let older = |release: &&str| series == NEWEST && SERIES.iter().any(|other| is_of(other, &numbers(release)));
    Ok(newest_first(series, releases.iter().map(String::as_str).filter(|release| !older(release))).into_iter().next())
}

/// Whether a version belongs to a series that is named by its first numbers.
fn is_of(series: &str, version: &[u64]) -> bool {
    let wanted: Vec<u64> = series.split('.').filter_map(|number| number.parse().ok()).collect();
    !wanted.is_empty() && version.starts_with(&wanted)
}

/// Releases of a series, the newest first.
fn newest_first<'a>(series: &str, releases: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut found: Vec<(Vec<u64>, &str)> = releases
        .filter(|release| release.ends_with(FLAVOUR) && release.starts_with(|c: char| c.is_ascii_digit()))
        .map(|release| (numbers(release.trim_end_matches(FLAVOUR)), release))
        // A series alone (linux-image-6.1-cloud-amd64) is the name of no kernel.
        .filter(|(numbers, _)| numbers.len() > 3 && (series == NEWEST || is_of(series, numbers)))
        .collect();
    found.sort();
    found.into_iter().rev().map(|(_, release)| release.to_owned()).collect()
}

/// The numbers in a version, in their order.
fn numbers(version: &str) -> Vec<u64> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

fn module_files(folder: &Path, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            module_files(&entry.path(), files)?;
        } else if module_name(&entry.path()).is_some() {
            files.push(entry.path());
        }
    }
    Ok(())
}

/// A module's name, as others depend on it.
fn module_name(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    name.strip_suffix(".ko").or_else(|| name.strip_suffix(".ko.xz")).map(|name| name.replace('-', "_"))
}

/// Adds a module after those that it needs. One that is no file is built in, or this kernel does not have it.
fn load_order(
    name: &str,
    files: &[PathBuf],
    loaded: &mut BTreeSet<String>,
    modules: &mut Vec<(String, Vec<u8>)>,
) -> anyhow::Result<()> {
    let Some(file) = files.iter().find(|file| module_name(file).as_deref() == Some(name)) else { return Ok(()) };
    if !loaded.insert(name.to_owned()) {
        return Ok(());
    }
    let content = read_module(file)?;
    for needed in dependencies(&content) {
        load_order(&needed, files, loaded, modules)?;
    }
    modules.push((name.to_owned(), content));
    Ok(())
}

fn read_module(file: &Path) -> anyhow::Result<Vec<u8>> {
    if file.extension().is_none_or(|extension| extension != "xz") {
        return fs::read(file).with_context(|| format!("cannot read {}", file.display()));
    }
    let output = Command::new("xz").args(["--decompress", "--stdout"]).arg(file).output().context("cannot run xz")?;
    if !output.status.success() {
        bail!("xz cannot unpack {}: {}", file.display(), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(output.stdout)
}

/// What a module says that it needs: `depends=a,b` among the strings of its section .modinfo.
fn dependencies(module: &[u8]) -> Vec<String> {
    const FIELD: &[u8] = b"\0depends=";
    let Some(at) = module.windows(FIELD.len()).position(|window| window == FIELD) else { return Vec::new() };
    let rest = &module[at + FIELD.len()..];
    let end = rest.iter().position(|byte| *byte == 0).unwrap_or(0);
    String::from_utf8_lossy(&rest[..end])
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|n| n.replace('-', "_"))
        .collect()
}

/// Whether what fetching and unpacking kernels takes is there.
pub fn check_tools() -> anyhow::Result<()> {
    for tool in ["apt-get", "dpkg-deb"] {
        process::ask(Command::new(tool).arg("--version")).map_err(|error| {
            anyhow::anyhow!(
                "{error}\nremedy: guests are made of Debian's packages; run this on Debian or one of its kind"
            )
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 9] = [
        "6.1-cloud-amd64",
        "6.1.0-9-cloud-amd64",
        "6.1.0-0.deb11.52-cloud-amd64",
        "6.1.0-56-cloud-amd64",
        "6.1.0-57-cloud-amd64-dbg",
        "6.12.117+deb12-cloud-amd64",
        "7.3.4+deb13-cloud-amd64",
        "cloud-amd64",
        "6.12.118+deb12-rt-amd64",
    ];

    #[test]
    fn a_series_is_found_by_its_numbers() {
        let of = |series| newest_first(series, NAMES.into_iter());
        assert_eq!(of("6.1"), ["6.1.0-56-cloud-amd64", "6.1.0-9-cloud-amd64", "6.1.0-0.deb11.52-cloud-amd64"]);
        assert_eq!(of("6.12"), ["6.12.117+deb12-cloud-amd64"]);
        assert_eq!(of(NEWEST)[0], "7.3.4+deb13-cloud-amd64");
        assert!(of("5.10").is_empty());
    }

    #[test]
    fn modules_say_what_they_need() {
        assert_eq!(dependencies(b"ELF\0license=GPL\0depends=stp,llc-x\0name=bridge\0"), ["stp", "llc_x"]);
        assert!(dependencies(b"ELF\0depends=\0name=stp\0").is_empty());
        assert_eq!(module_name(Path::new("/k/sch_fq.ko.xz")).as_deref(), Some("sch_fq"));
        assert_eq!(module_name(Path::new("/k/virtio-net.ko")).as_deref(), Some("virtio_net"));
        assert_eq!(module_name(Path::new("/k/modules.dep")), None);
    }
}

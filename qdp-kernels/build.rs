//! Compiles `cuda/*.cu` to one fatbin.
//!
//! nvcc is looked for in `QDP_NVCC`, `CUDA_HOME`, `PATH` and the `nvidia-cuda-nvcc` Python package,
//! in this order. `QDP_CUDA_ARCHS` names the architectures (`90`, `90,100`, `9.0 12.0`);
//! `QDP_SKIP_KERNELS=1` builds a crate without an image. nvcc itself reads `NVCC_CCBIN`,
//! `NVCC_PREPEND_FLAGS` and `NVCC_APPEND_FLAGS`.

#![expect(
    clippy::disallowed_methods,
    reason = "a build script is configured by the environment and reports failure by its exit status"
)]

use std::env;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

/// What a release wheel is built for, as far as the compiler knows it.
const DEFAULT_ARCHS: [u32; 7] = [75, 80, 86, 89, 90, 100, 120];

/// Directories of the Python packages' `nvcc`; `nvidia` is a namespace package of several parts.
const FIND_PACKAGES: &str = "import nvidia; print('\\n'.join(nvidia.__path__))";

const INPUTS: [&str; 7] = [
    "QDP_NVCC",
    "QDP_CUDA_ARCHS",
    "QDP_SKIP_KERNELS",
    "CUDA_HOME",
    "NVCC_CCBIN",
    "NVCC_PREPEND_FLAGS",
    "NVCC_APPEND_FLAGS",
];

const NO_NVCC: &str = "\
no CUDA compiler (nvcc) was found, so QDP's kernels cannot be built. One of these helps:
  1. pip install .                 (brings nvcc from PyPI as a build requirement), or
     pip install 'nvidia-cuda-nvcc==13.0.*' 'nvidia-nvvm==13.0.*' 'nvidia-cuda-crt==13.0.*' \\
                 'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-cccl==13.0.*'
     into the Python that `python3` or PYO3_PYTHON names
  2. QDP_NVCC=/path/to/nvcc        (one particular compiler)
  3. CUDA_HOME=/path/to/toolkit, or nvcc on PATH   (an installed CUDA toolkit)
  4. QDP_SKIP_KERNELS=1            (a CPU-only build, which says so at run time)";

type Result<T> = std::result::Result<T, String>;

fn main() {
    if let Err(message) = build() {
        // The panic message of a build script is buried; standard error of a failed one is shown.
        eprintln!("\nerror: {message}\n");
        exit(1);
    }
}

fn build() -> Result<()> {
    println!("cargo::rustc-check-cfg=cfg(qdp_kernels)");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=cuda");
    for name in INPUTS {
        println!("cargo::rerun-if-env-changed={name}");
    }

    if setting("QDP_SKIP_KERNELS").is_some_and(|value| value != "0") {
        println!("cargo::rustc-env=QDP_BUILT_ARCHS=");
        println!("cargo::warning=QDP_SKIP_KERNELS is set: this build has no CUDA kernels");
        return Ok(());
    }

    let out_dir = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let cuda_dir =
        PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").ok_or("no manifest")?).join("cuda");
    let nvcc = find_nvcc()?;
    let archs = architectures(&nvcc)?;
    let source = write_unit(&cuda_dir, &out_dir)?;
    compile(&nvcc, &archs, &cuda_dir, &source, &out_dir.join("kernels.fatbin"))?;

    let names: Vec<String> = archs.iter().map(u32::to_string).collect();
    println!("cargo::rustc-cfg=qdp_kernels");
    println!("cargo::rustc-env=QDP_BUILT_ARCHS={}", names.join(" "));
    Ok(())
}

/// An environment variable that is set and not empty.
fn setting(name: &str) -> Option<String> {
    env::var(name).ok().map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
}

fn find_nvcc() -> Result<PathBuf> {
    if let Some(named) = setting("QDP_NVCC") {
        let path = PathBuf::from(&named);
        // A compiler asked for by name is used or refused, never replaced by another.
        return if path.is_file() {
            Ok(watched(path))
        } else {
            Err(format!("QDP_NVCC={named} is not a file"))
        };
    }
    let toolkit = setting("CUDA_HOME").map(|home| Path::new(&home).join("bin/nvcc"));
    let on_path = env::var_os("PATH")
        .into_iter()
        .flat_map(|path| env::split_paths(&path).collect::<Vec<_>>())
        .map(|directory| directory.join("nvcc"));
    toolkit
        .into_iter()
        .chain(on_path)
        .find(|path| path.is_file())
        .map(watched)
        .or_else(find_packaged_nvcc)
        .ok_or_else(|| NO_NVCC.to_owned())
}

/// Rebuilds when this compiler is replaced. Not for the Python packages: their versions are
/// pinned, and in pip's isolated builds they lie in a directory that is gone afterwards.
fn watched(nvcc: PathBuf) -> PathBuf {
    println!("cargo::rerun-if-changed={}", nvcc.display());
    nvcc
}

/// nvcc of the `nvidia-cuda-nvcc` package. The interpreter is asked rather than its folders
/// guessed, because in pip's isolated builds the packages reach it through `PYTHONPATH`.
fn find_packaged_nvcc() -> Option<PathBuf> {
    [setting("PYO3_PYTHON"), Some("python3".to_owned()), Some("python".to_owned())]
        .into_iter()
        .flatten()
        .filter_map(|python| run(&python, ["-c", FIND_PACKAGES]).ok())
        .flat_map(|output| output.lines().map(PathBuf::from).collect::<Vec<_>>())
        .map(|part| part.join("cu13/bin/nvcc"))
        .find(|path| path.is_file())
}

/// The architectures to compile for, ascending.
fn architectures(nvcc: &Path) -> Result<Vec<u32>> {
    let listing = run(nvcc, ["--list-gpu-arch"])?;
    let known: Vec<u32> = listing
        .lines()
        .filter_map(|line| line.trim().strip_prefix("compute_"))
        .filter_map(|number| number.parse().ok())
        .collect();
    let mut archs = match setting("QDP_CUDA_ARCHS") {
        None => DEFAULT_ARCHS.into_iter().filter(|arch| known.contains(arch)).collect(),
        Some(list) => list
            .split([',', ' ', ';'])
            .filter(|word| !word.is_empty())
            .map(|word| match word.replace('.', "").parse() {
                Ok(arch) if known.contains(&arch) => Ok(arch),
                _ => Err(format!(
                    "QDP_CUDA_ARCHS: '{word}' is no architecture {} knows ({known:?})",
                    nvcc.display()
                )),
            })
            .collect::<Result<Vec<u32>>>()?,
    };
    archs.sort_unstable();
    archs.dedup();
    if archs.is_empty() {
        return Err(format!("{} knows none of {DEFAULT_ARCHS:?}", nvcc.display()));
    }
    Ok(archs)
}

/// Writes one translation unit that includes every `.cu` file: one module to load, and helper
/// templates are instantiated once.
fn write_unit(cuda_dir: &Path, out_dir: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(cuda_dir).map_err(|e| format!("{}: {e}", cuda_dir.display()))?;
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| Path::new(name).extension() == Some(OsStr::new("cu")))
        .collect();
    if names.is_empty() {
        return Err(format!("{} holds no .cu file", cuda_dir.display()));
    }
    names.sort_unstable(); // read_dir's order differs between machines; the image should not
    let mut unit = String::new();
    for name in &names {
        writeln!(unit, "#include \"{name}\"").expect("writing to a String does not fail");
    }
    let source = out_dir.join("kernels.cu");
    fs::write(&source, unit).map_err(|e| format!("{}: {e}", source.display()))?;
    Ok(source)
}

fn compile(nvcc: &Path, archs: &[u32], cuda_dir: &Path, source: &Path, image: &Path) -> Result<()> {
    let mut command = Command::new(nvcc);
    command
        .args(["-fatbin", "-O3", "--std=c++17", "--threads=0", "-Wno-deprecated-gpu-targets"])
        .args(["-Werror", "all-warnings"])
        // A tenth of the default's size; the driver unpacks one architecture, once, at open.
        .arg("--compress-mode=size")
        .arg("-I")
        .arg(cuda_dir);
    for arch in archs {
        command.arg(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
    }
    if let Some(newest) = archs.last() {
        // PTX of the newest, for GPUs that come after it.
        command.arg(format!("-gencode=arch=compute_{newest},code=compute_{newest}"));
    }
    command.arg("-o").arg(image).arg(source);

    let output = command.output().map_err(|e| format!("cannot run {}: {e}", nvcc.display()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!(
        "nvcc failed ({}): {command:?}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    ))
}

/// Standard output of a program that succeeds.
fn run<const N: usize>(program: impl AsRef<OsStr>, args: [&str; N]) -> Result<String> {
    let program = program.as_ref();
    let output = Command::new(program)
        .args(args)
        .output()
        .map_err(|e| format!("cannot run {}: {e}", program.display()))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(format!("{} failed: {}", program.display(), String::from_utf8_lossy(&output.stderr)))
    }
}

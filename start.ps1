# Serves a model on Windows: makes .venv and installs what is missing, then runs main.py with the arguments given here.
#   .\start.ps1 --hf-model demo
#   .\start.ps1 -TorchIndex URL --hf-model demo     PyTorch from that index: the CUDA build, for an NVIDIA GPU
#   .\start.ps1 -Cpu --hf-model demo                without the GPU
# Where scripts may not run:  powershell -ExecutionPolicy Bypass -File .\start.ps1 --hf-model demo
# Written for Windows PowerShell 5.1, which every Windows has; PowerShell 7 runs it as well.
[CmdletBinding(PositionalBinding = $false)]
param(
    [string]$TorchIndex = $env:TORCH_INDEX_URL,
    [switch]$Cpu,
    [Parameter(ValueFromRemainingArguments = $true)][string[]]$Arguments = @()
)
# Programs are judged by their exit codes: in PowerShell 5.1 "Stop" would take any line on stderr for a failure.
$ErrorActionPreference = 'Continue'

$python = Join-Path $PSScriptRoot '.venv\Scripts\python.exe'
$stamp = Join-Path $PSScriptRoot '.venv\installed-requirements.txt'

function Install {
    & $python -m pip install --disable-pip-version-check @args
    if ($LASTEXITCODE -ne 0) {
        Write-Host 'The installation failed; the lines above say why. Start again to try again.'
        exit $LASTEXITCODE
    }
}

function Test-Venv {
    if (-not (Test-Path -LiteralPath $python)) { return $false }
    # What is left of an environment whose Python was removed, or that was moved, is made again.
    & $python -m pip --version >$null 2>$null
    return $LASTEXITCODE -eq 0
}

function New-Venv {
    foreach ($candidate in @('py -3.12', 'py -3.13', 'py -3.11', 'py -3', 'python', 'python3')) {
        $program, $option = $candidate -split ' '
        if (-not (Get-Command $program -ErrorAction SilentlyContinue)) { continue }
        $options = @($option | Where-Object { $_ })
        # The python.exe that only opens the Store fails here too.
        & $program @options -c 'import sys; sys.exit(sys.version_info < (3, 11) or sys.maxsize < 2**32)' >$null 2>$null
        if ($LASTEXITCODE -ne 0) { continue }
        & $program @options -m venv --clear .venv
        if ($LASTEXITCODE -eq 0) { return }
    }
    Write-Host 'Python 3.11 or newer, 64-bit, is needed and was not found. Install it from python.org and start again.'
    exit 1
}

if ($IsWindows -eq $false) {
    # Not set in 5.1, which is Windows by itself.
    Write-Host 'On Linux and macOS: ./start.sh'
    exit 1
}

# Back where the caller was, also after exit.
Push-Location -LiteralPath $PSScriptRoot
try {
    # The stamp holds the very text that was installed, and where torch came from. The last word keeps 7.2 from being
    # taken for the beginning of 7.2.2.
    $wanted = (Get-Content -Raw -LiteralPath requirements.txt) + "# end`n"
    if ($TorchIndex) { $wanted += "# torch from $TorchIndex" }
    $installed = ''
    if ((Test-Path -LiteralPath $stamp) -and (Test-Path -LiteralPath $python)) {
        $installed = [string](Get-Content -Raw -LiteralPath $stamp)
    }

    # Started later without an index, torch stays as it is: the stamp only has to begin with the wanted text.
    if (-not $installed.StartsWith($wanted, [System.StringComparison]::Ordinal)) {
        if (-not ($TorchIndex -or $Cpu) -and (Get-Command nvidia-smi -ErrorAction SilentlyContinue)) {
            Write-Host 'This machine has an NVIDIA GPU, and the default PyTorch for Windows cannot use it.'
            Write-Host 'The selector on the "Get started" page of pytorch.org shows the address of the CUDA build:'
            Write-Host '    .\start.ps1 -TorchIndex ADDRESS ...      uses the GPU'
            Write-Host '    .\start.ps1 -Cpu ...                     goes on without it'
            exit 1
        }
        if (-not (Test-Venv)) { New-Venv }
        Remove-Item -LiteralPath $stamp -ErrorAction SilentlyContinue
        if ($TorchIndex) {
            $pin = (Select-String -Path requirements.txt -Pattern '^torch==([^ ;#]+)').Matches[0].Groups[1].Value
            # Forced, because another build of the same version counts as installed; what it needs comes with the rest.
            Install --force-reinstall --no-deps --index-url $TorchIndex "torch==$pin"
        }
        Install -r requirements.txt
        Set-Content -LiteralPath $stamp -Value $wanted -NoNewline
    }

    & $python main.py @Arguments
    exit $LASTEXITCODE
}
finally {
    Pop-Location
}

# Serves a model on Windows: makes .venv and installs what is missing, then runs main.py with the arguments given here.
#   .\start.ps1 --hf-model demo
#   .\start.ps1 -TorchIndex URL --hf-model demo     PyTorch from that index: the CUDA build, for an NVIDIA GPU
#   .\start.ps1 -Cpu --hf-model demo                without the GPU
[CmdletBinding(PositionalBinding = $false)]
param(
    [string]$TorchIndex = $env:TORCH_INDEX_URL,
    [switch]$Cpu,
    [Parameter(ValueFromRemainingArguments = $true)][string[]]$Arguments = @()
)
# Programs are judged by their exit codes: in PowerShell 5.1 "Stop" would take any line on stderr for a failure.
$ErrorActionPreference = 'Continue'
Set-Location -LiteralPath $PSScriptRoot

$python = Join-Path $PSScriptRoot '.venv\Scripts\python.exe'
$stamp = Join-Path $PSScriptRoot '.venv\installed-requirements.txt'

function Install {
    & $python -m pip install --disable-pip-version-check @args
    if ($LASTEXITCODE -ne 0) { exit $LASTEXITCODE }
}

function New-Venv {
    foreach ($candidate in @('py -3.12', 'py -3.13', 'py -3.11', 'py -3', 'python', 'python3')) {
        $program, $option = $candidate -split ' '
        if (-not (Get-Command $program -ErrorAction SilentlyContinue)) { continue }
        $options = @($option | Where-Object { $_ })
        & $program @options -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>$null
        if ($LASTEXITCODE -ne 0) { continue }
        & $program @options -m venv --clear .venv
        if ($LASTEXITCODE -eq 0) { return }
    }
    Write-Host 'Python 3.11 or newer is needed and was not found. Install it from python.org and start again.'
    exit 1
}

# The stamp holds the very text that was installed, and where torch came from.
$wanted = Get-Content -Raw requirements.txt
if ($TorchIndex) { $wanted += "# torch from $TorchIndex" }
$installed = ''
if ((Test-Path $stamp) -and (Test-Path $python)) { $installed = Get-Content -Raw $stamp }

if (-not $installed.StartsWith($wanted)) {
    if (-not ($TorchIndex -or $Cpu) -and (Get-Command nvidia-smi -ErrorAction SilentlyContinue)) {
        Write-Host 'This machine has an NVIDIA GPU, and the default PyTorch for Windows cannot use it.'
        Write-Host 'The selector on the "Get started" page of pytorch.org shows the address of the CUDA build:'
        Write-Host '    .\start.ps1 -TorchIndex ADDRESS ...      uses the GPU'
        Write-Host '    .\start.ps1 -Cpu ...                     goes on without it'
        exit 1
    }
    if (-not (Test-Path $python)) { New-Venv }
    if ($TorchIndex) {
        $pin = (Select-String -Path requirements.txt -Pattern '^torch==([^ ;#]+)').Matches[0].Groups[1].Value
        # Forced, because another build of the same version counts as installed; its dependencies come with the rest.
        Install --force-reinstall --no-deps --index-url $TorchIndex "torch==$pin"
    }
    Install -r requirements.txt
    Set-Content -LiteralPath $stamp -Value $wanted -NoNewline
}

& $python main.py @Arguments
exit $LASTEXITCODE

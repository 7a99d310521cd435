package fleet

import "path/filepath"

// UseRelease lets the fleet's commands, and every process made from now on, run
// from another directory with both binaries. Processes that exist keep theirs.
func (f *Fleet) UseRelease(bin string) { f.cfg.Bin = bin }

// Replace installs the process's program from another directory with both
// binaries, as a package does: the next start runs it.
func (p *Process) Replace(bin string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.bin = filepath.Join(bin, filepath.Base(p.bin))
}

// Start starts the process without waiting until it is ready.
func (p *Process) Start() error { return p.start() }

// Ended is closed when the process has ended. It is nil before the first start.
func (p *Process) Ended() <-chan struct{} { return p.ended() }

package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/relais-mta/relais/relay/engine"
)

// screen is a terminal that shows one page at a time and reads keys.
type screen struct {
	keys    io.Reader
	out     io.Writer
	size    func() (width, height int)
	restore func() // gives the terminal back as it was
}

// The sequences of ECMA-48 that every terminal of today knows; none is a colour.
const (
	otherPage  = "\x1b[?1049h" // keeps what stands on the screen
	firstPage  = "\x1b[?1049l"
	hideCursor = "\x1b[?25l"
	showCursor = "\x1b[?25h"
	goHome     = "\x1b[H"
	clearLine  = "\x1b[K"
	clearRest  = "\x1b[J"
)

// openScreen reports whether both are a terminal, and returns it. Nothing is
// changed before begin.
func openScreen(in, out *os.File) (*screen, bool) {
	if _, err := unix.IoctlGetTermios(int(in.Fd()), unix.TCGETS); err != nil {
		return nil, false
	}
	if _, err := unix.IoctlGetWinsize(int(out.Fd()), unix.TIOCGWINSZ); err != nil || os.Getenv("TERM") == "dumb" {
		return nil, false
	}
	s := &screen{keys: in, out: out}
	s.size = func() (int, int) {
		w, err := unix.IoctlGetWinsize(int(out.Fd()), unix.TIOCGWINSZ)
		if err != nil || w.Col == 0 || w.Row == 0 {
			return 80, 24
		}
		return int(w.Col), int(w.Row)
	}
	s.restore = func() {}
	return s, true
}

// begin takes the terminal: keys come one by one and are not shown, another page
// is on the screen. Ctrl-C stays a signal.
func (s *screen) begin() error {
	file, ok := s.keys.(*os.File)
	if !ok {
		return nil
	}
	was, err := unix.IoctlGetTermios(int(file.Fd()), unix.TCGETS)
	if err != nil {
		return err
	}
	raw := *was
	raw.Lflag &^= unix.ICANON | unix.ECHO
	raw.Cc[unix.VMIN], raw.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(int(file.Fd()), unix.TCSETS, &raw); err != nil {
		return err
	}
	s.restore = func() { _ = unix.IoctlSetTermios(int(file.Fd()), unix.TCSETS, was) } // nothing is left to do about an error
	_, err = io.WriteString(s.out, otherPage+hideCursor)
	return err
}

// end gives the terminal back.
func (s *screen) end() {
	_, _ = io.WriteString(s.out, showCursor+firstPage)
	s.restore()
}

// show puts a page on the screen, over the one that is there.
func (s *screen) show(page string) error {
	page = strings.ReplaceAll(strings.TrimSuffix(page, "\n"), "\n", clearLine+"\r\n")
	_, err := io.WriteString(s.out, goHome+page+clearLine+clearRest)
	return err
}

// runTop shows lanes until q, Ctrl-C or the end of ctx.
func runTop(ctx context.Context, s *screen, read func(context.Context) ([]engine.LaneInfo, error), sorting string, interval time.Duration) error {
	lanes, err := read(ctx) // a relay that does not run is said before the screen is taken
	if err != nil {
		return err
	}
	if err := s.begin(); err != nil {
		return err
	}
	defer s.end()
	resized := make(chan os.Signal, 1)
	signal.Notify(resized, syscall.SIGWINCH)
	defer signal.Stop(resized)
	keys := make(chan byte)
	go readKeys(ctx, s.keys, keys)
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	problem := ""
	for {
		now := time.Now()
		width, height := s.size()
		page := renderLanes(lanes, view{sorting: sorting, now: now, width: width, height: height, problem: problem,
			title: fmt.Sprintf("relais-relay lanes  %s  by %s  (s w d f b o p: order, q: end)", now.Format(time.TimeOnly), sorting)})
		if err := s.show(page); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-resized:
		case key, ok := <-keys:
			if next := sortKeys[key]; next != "" {
				sorting = next
			}
			if key == 'q' || key == 'Q' {
				return nil
			}
			if !ok {
				keys = nil // nobody is there to press any
			}
		case <-ticker.C:
			if fresh, err := read(ctx); err == nil {
				lanes, problem = fresh, ""
			} else if ctx.Err() == nil {
				problem = message(err)
			}
		}
	}
}

// readKeys passes keys on until there are no more or ctx ends. A read that waits
// then ends with the program.
func readKeys(ctx context.Context, in io.Reader, keys chan<- byte) {
	defer close(keys)
	var b [1]byte
	for {
		if n, err := in.Read(b[:]); n == 0 || err != nil {
			return
		}
		select {
		case keys <- b[0]:
		case <-ctx.Done():
			return
		}
	}
}

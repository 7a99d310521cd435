package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/relais-mta/relais/shared/fault"
)

// checkTimeout bounds both checks of the queue's records, for each million of
// recipients.
const checkTimeout = 10 * time.Minute

func (b *bench) checkTimeout() time.Duration {
	return time.Duration(float64(checkTimeout) * max(1, float64(b.o.n)/spaceFor))
}

// logTail reads what a process appends to its log.
type logTail struct {
	path string
	at   int64
	part []byte // of the last line, not ended yet
}

// openTail begins at the end of the log.
func openTail(path string) (*logTail, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	return &logTail{path: path, at: info.Size()}, nil
}

// find returns the first new line that holds the words; nil: there is none yet.
func (t *logTail) find(words []byte) ([]byte, error) {
	f, err := os.Open(t.path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	for {
		n, err := f.ReadAt(buf, t.at)
		t.at += int64(n)
		t.part = append(t.part, buf[:n]...)
		for {
			line, rest, ok := bytes.Cut(t.part, []byte{'\n'})
			if !ok {
				break
			}
			if t.part = rest; bytes.Contains(line, words) {
				return bytes.Clone(line), nil
			}
		}
		t.part = bytes.Clone(t.part)
		if err == io.EOF {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
	}
}

// startCheck waits for the end of the check that a start begins, and takes down
// how long it took beside everything else.
func (b *bench) startCheck(ctx context.Context, t *logTail) error {
	for end := time.Now().Add(b.checkTimeout()); time.Now().Before(end); {
		line, err := t.find([]byte(`"msg":"the queue was checked"`))
		if err != nil {
			return err
		}
		if line == nil {
			if err := sleep(ctx, 200*time.Millisecond); err != nil {
				return err
			}
			continue
		}
		var got struct {
			Clean    bool    `json:"clean"`
			Messages int64   `json:"messages"`
			Seconds  float64 `json:"seconds"`
		}
		if err := json.Unmarshal(line, &got); err != nil {
			return fault.Wrap(err, fault.Internal, "bench-deep", "the log is not understood")
		}
		if !got.Clean {
			return fault.New(fault.Internal, "bench-deep", "the records of the queue disagree after a kill: %s", line)
		}
		b.r.add("start_check", got.Seconds, "s", fmt.Sprintf("after the kill, at a quarter of one processor: %d messages", got.Messages))
		return nil
	}
	return fault.New(fault.Timeout, "bench-deep", "the check of the start did not end within %v", b.checkTimeout())
}

// fsck checks the queue of the stopped relay.
func (b *bench) fsck(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, b.checkTimeout())
	defer cancel()
	begun := time.Now()
	cmd := exec.CommandContext(ctx, filepath.Join(b.o.bin, "relais-relay"), "queue", "fsck", "--json", "--data", b.relay.Dir)
	out, err := cmd.Output()
	took := time.Since(begun)
	if err != nil {
		return fault.Wrap(err, fault.Internal, "bench-deep", "fsck of the stopped relay found something: %s", bytes.TrimSpace(out))
	}
	used := cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	note := fmt.Sprintf("relais-relay queue fsck, %.1f s of processor time", used.Seconds())
	if usage, ok := peakOf(cmd.ProcessState); ok {
		note += fmt.Sprintf(", at most %d MiB resident", usage/mib)
	}
	b.r.add("fsck", took.Seconds(), "s", note)
	return nil
}

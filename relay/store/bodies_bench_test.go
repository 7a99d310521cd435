package store

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/dgraph-io/badger/v4"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

// What BenchmarkBodies writes: messages of benchBody bytes, each with the
// records that the queue writes for it, taken over and, benchDepth messages
// later, delivered, in transactions of benchGroup messages.
const (
	benchBody     = 2048
	benchEnvelope = 220
	benchEvent    = 180
	benchDepth    = 20_000
	benchGroup    = 256
	benchWorkers  = 4
	benchGCEvery  = 100_000 // messages between two collections of Badger's value log
)

// bodyKeeper is a way to keep bodies.
type bodyKeeper interface {
	accept(ids []ids.Message, body []byte) error
	deliver(ids []ids.Message) error
	reclaim() error // what has to be done now and then
	rest() error    // what has to be done until space is back
	close() error
}

// BenchmarkBodies compares where bodies may be kept: in segments beside the
// index, in Badger's value log, and in Badger's tree. Run it with a number of
// messages, as in
//
//	go test ./relay/store -run '^$' -bench Bodies -benchtime 1000000x
//
// It reports bytes written to the disk for each byte of body (by the kernel's
// account of the process, less what was cancelled), what is occupied at the end
// when all are delivered and the store is closed (64 MiB of it are the store's
// reserve), and how long opening takes after a kill.
func BenchmarkBodies(b *testing.B) {
	for _, k := range []struct {
		name string
		open func(dir string) (bodyKeeper, error)
	}{
		{"segments", openSegments},
		{"valuelog", func(dir string) (bodyKeeper, error) { return openPlain(dir, 1<<10) }},
		{"tree", func(dir string) (bodyKeeper, error) { return openPlain(dir, 1<<20) }},
	} {
		b.Run(k.name, func(b *testing.B) { benchBodies(b, k.open) })
	}
}

func benchBodies(b *testing.B, open func(string) (bodyKeeper, error)) {
	dir := b.TempDir()
	k, err := open(dir)
	if err != nil {
		b.Fatal(err)
	}
	body := make([]byte, benchBody)
	rng := rand.NewChaCha8([32]byte{1})
	_, _ = rng.Read(body) // documented never to fail
	before := written(b)
	var done atomic.Int64
	left := make([][][]ids.Message, benchWorkers)
	b.ResetTimer()
	var wg sync.WaitGroup
	for worker := range benchWorkers {
		wg.Go(func() {
			waiting, err := benchWork(b.N, k, body, &done)
			if left[worker] = waiting; err != nil {
				b.Error(err)
			}
		})
	}
	wg.Wait()
	b.StopTimer()
	if b.Failed() {
		return
	}
	seconds := b.Elapsed().Seconds()
	b.ReportMetric(float64(b.N)/seconds, "msg/s")
	copied := filepath.Join(b.TempDir(), "copy")
	if out, err := exec.Command("cp", "-a", "--sparse=always", dir, copied).CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	began := time.Now()
	again, err := open(copied)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(time.Since(began).Seconds()*1000, "ms-to-open")
	if err := again.close(); err != nil {
		b.Fatal(err)
	}
	for _, waiting := range left {
		for _, group := range waiting {
			if err := k.deliver(group); err != nil {
				b.Fatal(err)
			}
		}
	}
	if err := k.rest(); err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(written(b)-before)/float64(b.N)/benchBody, "written/byte")
	if err := k.close(); err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(occupied(b, dir))/(1<<20), "MiB-left")
}

// benchWork takes over and delivers messages until there were n, and returns
// the groups that were not delivered.
func benchWork(n int, k bodyKeeper, body []byte, done *atomic.Int64) (waiting [][]ids.Message, err error) {
	for {
		now := done.Add(benchGroup)
		if now > int64(n)+benchGroup-1 {
			return waiting, nil
		}
		group := make([]ids.Message, benchGroup)
		for i := range group {
			group[i] = newID()
		}
		if err := k.accept(group, body); err != nil {
			return waiting, err
		}
		if waiting = append(waiting, group); len(waiting) > benchDepth/benchGroup/benchWorkers {
			if err := k.deliver(waiting[0]); err != nil {
				return waiting, err
			}
			waiting = waiting[1:]
		}
		if now/benchGCEvery != (now-benchGroup)/benchGCEvery {
			if err := k.reclaim(); err != nil {
				return waiting, err
			}
		}
	}
}

// written is what this process had written to the disk (proc_pid_io(5)). The
// copy made by cp is another process.
func written(b *testing.B) (n int64) {
	text, err := os.ReadFile("/proc/self/io")
	if err != nil {
		b.Fatal(err)
	}
	lines := bufio.NewScanner(bytes.NewReader(text))
	for lines.Scan() {
		var v int64
		if _, err := fmt.Sscanf(strings.TrimPrefix(lines.Text(), "cancelled_"), "write_bytes: %d", &v); err != nil {
			continue
		}
		if strings.HasPrefix(lines.Text(), "cancelled_") {
			v = -v
		}
		n += v
	}
	return n
}

// occupied is the space that the files of a directory take.
func occupied(b *testing.B, dir string) (n int64) {
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return nil // it went meanwhile
		}
		if info, err := d.Info(); err == nil {
			n += info.Sys().(*syscall.Stat_t).Blocks * 512
		}
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
	return n
}

func benchKeys(id ids.Message, f func(key, value []byte)) {
	due := time.Now().UnixMilli()
	f(AppendWaitingKey(nil, 7, due, id, 0), nil)
	f(AppendDeadlineKey(nil, due, id), nil)
}

// segments is the store as it is.
type segments struct {
	s    *Store
	mu   sync.Mutex
	refs map[ids.Message]kept
}

type kept struct {
	ref  relay.BodyRef
	keys [][]byte
}

func openSegments(dir string) (bodyKeeper, error) {
	s, err := Open(context.Background(), Config{
		Dir: dir, Logger: slog.New(slog.DiscardHandler),
		Storage: policy.Storage{MinFreeBytes: 1 << 30, MinFreeInodes: 10, ReserveBytes: 64 << 20, SegmentBytes: 256 << 20, MaxOutboxBytes: 1 << 30},
	})
	if err != nil {
		return nil, err
	}
	<-s.Counted()
	return &segments{s: s, refs: make(map[ids.Message]kept)}, nil
}

func (k *segments) commit(list []ids.Message, fill func(*Batch, ids.Message) error) error {
	done := make(chan error, len(list))
	for _, id := range list {
		b := k.s.NewBatch()
		if err := fill(b, id); err != nil {
			return err
		}
		k.s.CommitAsync(b, func(err error) { done <- err })
	}
	for range list {
		if err := <-done; err != nil {
			return err
		}
	}
	return nil
}

func (k *segments) accept(list []ids.Message, text []byte) error {
	bodies := make(map[ids.Message]*Body, len(list))
	err := k.commit(list, func(b *Batch, id ids.Message) error {
		body := k.s.NewBody()
		if _, err := body.Write(text); err != nil {
			return err
		}
		if err := body.Seal(0, [32]byte{}); err != nil {
			return err
		}
		bodies[id] = body
		var keys [][]byte
		benchKeys(id, func(key, value []byte) {
			keys = append(keys, key)
			b.Set(key, value)
		})
		k.mu.Lock()
		k.refs[id] = kept{keys: keys}
		k.mu.Unlock()
		b.Set(AppendOutboxKey(nil, binary.BigEndian.Uint64(id[8:])), make([]byte, benchEvent))
		value := append(AppendRef([]byte{1}, body.Ref()), make([]byte, benchEnvelope)...)
		return b.SetWithBody(AppendMessageKey(nil, id), value, 1, id, body)
	})
	k.mu.Lock()
	defer k.mu.Unlock()
	for id, body := range bodies {
		k.refs[id] = kept{body.Ref(), k.refs[id].keys}
	}
	return err
}

func (k *segments) deliver(list []ids.Message) error {
	return k.commit(list, func(b *Batch, id ids.Message) error {
		k.mu.Lock()
		defer k.mu.Unlock()
		for _, key := range k.refs[id].keys {
			b.Delete(key)
		}
		b.Delete(AppendMessageKey(nil, id))
		b.Delete(AppendOutboxKey(nil, binary.BigEndian.Uint64(id[8:])))
		b.DropBody(k.refs[id].ref)
		delete(k.refs, id)
		return nil
	})
}

func (k *segments) reclaim() error { return nil }
func (k *segments) close() error   { return k.s.Close() }

// rest waits until what nothing lives in is gone: one segment is written to.
func (k *segments) rest() error {
	limit := time.After(time.Minute)
	for k.s.Stats().BodyFiles > 1 {
		select {
		case <-time.After(10 * time.Millisecond):
		case <-limit:
			return fmt.Errorf("%d body files are left", k.s.Stats().BodyFiles)
		}
	}
	return nil
}

// plain is Badger alone, with bodies as values.
type plain struct {
	db   *badger.DB
	mu   sync.Mutex
	keys map[ids.Message][][]byte
}

func openPlain(dir string, threshold int64) (bodyKeeper, error) {
	opt := indexOptions(dir, defaultMemTableBytes, slog.New(slog.DiscardHandler)).WithValueThreshold(threshold).WithValueLogFileSize(256 << 20)
	db, err := badger.Open(opt)
	return &plain{db: db, keys: make(map[ids.Message][][]byte)}, err
}

func (k *plain) accept(list []ids.Message, text []byte) error {
	return k.db.Update(func(txn *badger.Txn) error {
		for _, id := range list {
			var err error
			set := func(key, value []byte) {
				k.mu.Lock()
				k.keys[id] = append(k.keys[id], key)
				k.mu.Unlock()
				if err == nil {
					err = txn.Set(key, value)
				}
			}
			benchKeys(id, set)
			set(AppendOutboxKey(nil, binary.BigEndian.Uint64(id[8:])), make([]byte, benchEvent))
			set(AppendMessageKey(nil, id), make([]byte, benchEnvelope))
			set(append([]byte{'b'}, id[:]...), text)
			if err != nil {
				return err
			}
		}
		return nil
	})
}

func (k *plain) deliver(list []ids.Message) error {
	return k.db.Update(func(txn *badger.Txn) error {
		for _, id := range list {
			k.mu.Lock()
			keys := k.keys[id]
			delete(k.keys, id)
			k.mu.Unlock()
			for _, key := range keys {
				if err := txn.Delete(key); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// reclaim collects the value log for as long as that gives something back.
func (k *plain) reclaim() error {
	for {
		switch err := k.db.RunValueLogGC(0.5); err {
		case nil:
		case badger.ErrNoRewrite, badger.ErrRejected: // another worker is at it
			return nil
		default:
			return err
		}
	}
}

func (k *plain) rest() error {
	if err := k.db.Flatten(2); err != nil {
		return err
	}
	return k.reclaim()
}

func (k *plain) close() error { return k.db.Close() }

package e2e

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/pelletier/go-toml/v2"

	"github.com/relais-mta/relais/shared/lab/fleet"
)

// registerInput is what a client asked: to read, or to write at a revision.
type registerInput struct {
	key    int
	write  bool
	expect uint64
	value  bool
}

// registerOutput is what it was told.
type registerOutput struct {
	done     bool // the answer came
	conflict bool
	revision uint64
	value    bool
}

type register struct {
	revision uint64
	value    bool
}

// registerModel is a set of registers with compare-and-swap by revision. A write
// whose outcome is unknown may have happened with any later revision, so
// revisions of such writes are learned from what others saw.
var registerModel = porcupine.NondeterministicModel{
	Partition: func(all []porcupine.Operation) [][]porcupine.Operation {
		parts := make(map[int][]porcupine.Operation)
		for _, op := range all {
			key := op.Input.(registerInput).key
			parts[key] = append(parts[key], op)
		}
		var out [][]porcupine.Operation
		for _, part := range parts {
			out = append(out, part)
		}
		return out
	},
	Init: func() []any { return []any{register{}} },
	Step: func(state, input, output any) []any {
		s, in, out := state.(register), input.(registerInput), output.(registerOutput)
		known := s.revision != 0
		switch {
		case !in.write:
			if known && (out.revision != s.revision || out.value != s.value) {
				return nil
			}
			if !known && s != (register{}) && out.value != s.value {
				return nil
			}
			return []any{register{out.revision, out.value}}
		case !out.done: // it happened here, or never
			return []any{s, register{0, in.value}}
		case out.conflict:
			if known && in.expect == s.revision {
				return nil
			}
			return []any{s}
		}
		// A write that leaves the row as it is succeeds whatever it expected, so
		// that a write of unknown outcome can be repeated.
		if idle := out.revision == s.revision && in.value == s.value; known && in.expect != s.revision && !idle {
			return nil
		}
		return []any{register{out.revision, out.value}}
	},
}

const (
	historyClients = 4
	historyCheck   = time.Minute
	touchTimeout   = 3 * time.Second
	shunFor        = 5 * time.Second // a server that did not answer in time
)

// history is what clients did to some registers, which are rows of tenants,
// through all servers of a cluster.
type history struct {
	t       *testing.T
	keys    int
	key     string // of the API
	web     *http.Client
	servers atomic.Pointer[[]*fleet.ControlServer]
	begin   time.Time
	clients sync.WaitGroup
	end     atomic.Bool
	writes  atomic.Int64

	mu      sync.Mutex
	ops     []porcupine.Operation
	took    []time.Duration // of writes
	unknown int             // writes without an answer
}

// startHistory lets clients compare-and-swap and read until check. They wait
// for pace between two operations; 0 is without a pause.
func startHistory(t *testing.T, f *trio, keys int, pace time.Duration) *history {
	t.Helper()
	h := &history{t: t, keys: keys, begin: time.Now()}
	h.use(f.servers...)
	var cli struct {
		Key string `toml:"key"`
	}
	text, err := os.ReadFile(filepath.Join(f.servers[0].Dir, "cli.toml"))
	if err == nil {
		err = toml.Unmarshal(text, &cli)
	}
	if err != nil {
		t.Fatal(err)
	}
	h.key = cli.Key
	for key := range keys {
		// A busy machine may choose leaders for longer than a command waits. What a
		// command had no answer to may be done.
		name := fmt.Sprint("register", key)
		eventually(t, time.Minute, name+" to be made", func() bool {
			_, err := f.Ctl(t.Context(), "tenant", "add", name)
			return err == nil || strings.Contains(err.Error(), "exists already")
		})
	}
	h.web = &http.Client{Timeout: touchTimeout, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: f.CA()}, MaxIdleConnsPerHost: historyClients}}
	t.Cleanup(h.stop)
	for id := range historyClients {
		h.clients.Go(func() { h.client(id, pace) })
	}
	return h
}

// use says which servers the clients ask.
func (h *history) use(servers ...*fleet.ControlServer) {
	servers = slices.Clone(servers)
	h.servers.Store(&servers)
}

func (h *history) stop() {
	h.end.Store(true)
	h.clients.Wait()
	h.web.CloseIdleConnections()
}

func (h *history) client(id int, pace time.Duration) {
	rng := rand.New(rand.NewPCG(uint64(id), 7))
	seen := make([]register, h.keys)
	shun := make(map[*fleet.ControlServer]time.Time)
	var pause <-chan time.Time
	if pace > 0 {
		tick := time.NewTicker(pace)
		defer tick.Stop()
		pause = tick.C
	}
	for !h.end.Load() && h.t.Context().Err() == nil {
		key := rng.IntN(h.keys)
		servers := *h.servers.Load()
		s := servers[rng.IntN(len(servers))]
		if time.Since(shun[s]) < shunFor && rng.IntN(20) > 0 {
			continue
		}
		in := registerInput{key: key, write: seen[key].revision != 0 && rng.IntN(2) == 0, expect: seen[key].revision, value: !seen[key].value}
		begin := time.Now()
		if seen[key] = h.once(id, s, in, seen[key]); time.Since(begin) >= touchTimeout {
			shun[s] = time.Now()
		}
		if pause != nil {
			select {
			case <-pause:
			case <-h.t.Context().Done():
			}
		}
	}
}

// once makes one operation, records it, and returns what the client knows then.
func (h *history) once(id int, s *fleet.ControlServer, in registerInput, seen register) register {
	call := time.Since(h.begin)
	out, unheard := h.touch(h.t.Context(), "https://"+s.API(), in)
	end := time.Since(h.begin)
	if unheard || !out.done && !in.write {
		return seen
	}
	op := porcupine.Operation{ClientId: id, Input: in, Call: call.Nanoseconds(), Output: out, Return: end.Nanoseconds()}
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case !out.done:
		op.Return = time.Hour.Nanoseconds() // it may happen any time after
		h.unknown++
		seen = register{}
	case !out.conflict:
		seen = register{out.revision, out.value}
		if in.write {
			h.writes.Add(1)
			h.took = append(h.took, end-call)
		}
	default:
		seen = register{} // somebody else wrote: read first
	}
	h.ops = append(h.ops, op)
	return seen
}

// check ends the clients, reads every register at every server, and fails the
// test if no order of the operations explains what was seen.
func (h *history) check() {
	h.t.Helper()
	h.stop()
	for _, s := range *h.servers.Load() {
		for key := range h.keys {
			in := registerInput{key: key}
			eventually(h.t, 20*time.Second, "a last read at "+s.Name, func() bool {
				before := len(h.ops)
				h.once(0, s, in, register{})
				return len(h.ops) > before
			})
		}
	}
	if len(h.took) == 0 {
		h.t.Fatal("no write was acknowledged")
	}
	slices.Sort(h.took)
	start := time.Now()
	result := porcupine.CheckOperationsTimeout(registerModel.ToModel(), h.ops, historyCheck)
	h.t.Logf("history: %d operations, %d writes acknowledged, %d of unknown outcome, p50 of a write over HTTPS %s, checked in %s: %s",
		len(h.ops), h.writes.Load(), h.unknown, h.took[len(h.took)/2].Round(100*time.Microsecond), time.Since(start).Round(time.Millisecond), result)
	if result != porcupine.Ok {
		h.t.Errorf("the history of %d operations is %s", len(h.ops), result)
	}
}

// touch reads or writes a register at one server. unheard says that nothing can
// have happened.
func (h *history) touch(ctx context.Context, server string, in registerInput) (out registerOutput, unheard bool) {
	method, path, body := http.MethodGet, fmt.Sprint("/api/v1/tenants/register", in.key), ""
	if in.write {
		method, path, body = http.MethodPut, path+"/suspended", fmt.Sprintf(`{"suspended":%t}`, in.value)
	}
	req, err := http.NewRequestWithContext(ctx, method, server+path, strings.NewReader(body))
	if err != nil {
		return out, true
	}
	req.Header.Set("Authorization", "Bearer "+h.key)
	if in.write {
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set("If-Match", fmt.Sprintf(`"%d"`, in.expect))
	} else {
		req.Header.Set("Relais-Read", "fenced")
	}
	resp, err := h.web.Do(req)
	if err != nil {
		return out, strings.Contains(err.Error(), "connect: connection refused")
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return out, false
	}
	var answer struct {
		Revision  uint64 `json:"revision"`
		Suspended bool   `json:"suspended"`
		Retry     bool   `json:"retry"`
	}
	if json.Unmarshal(text, &answer) != nil {
		return out, false
	}
	switch {
	case resp.StatusCode == http.StatusOK:
		return registerOutput{done: true, revision: answer.Revision, value: answer.Suspended}, false
	case resp.StatusCode == http.StatusConflict:
		return registerOutput{done: true, conflict: true}, false
	}
	return out, answer.Retry || !in.write
}

// TestHistoryIsLinearizable lets clients compare-and-swap and read through all
// servers while leaders are killed, and checks the history.
func TestHistoryIsLinearizable(t *testing.T) {
	f := startTrio(t, fleet.Config{Open: true, NoDKIM: true})
	h := startHistory(t, f, 1, 0)
	for range 3 {
		target := h.writes.Load() + 60
		// A machine that is ten times slower takes a second for a write, and of clients
		// that swap the same row one at a time succeeds.
		eventually(t, 2*time.Minute, "writes", func() bool { return h.writes.Load() >= target })
		leads, _ := f.leader()
		leads.Kill()
		if err := f.StartServer(within(t, time.Minute), leads); err != nil {
			t.Error(err)
		}
	}
	h.check()
}

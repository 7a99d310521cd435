package queue

import (
	"bufio"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/ids"
)

// crashChild names the data directory to the process that is killed.
const crashChild = "RELAIS_QUEUE_CRASH_DIR"

// crashMain accepts and delivers mail until it is killed, and says on standard
// output what was promised: "A id" when a message is accepted, "D id" when its
// end is recorded, "T id" when it is about to be tried. Some attempts are put
// off, rules hold and release one domain in bulk, and segments are so small that
// space is reclaimed all the time.
func crashMain() int {
	dir := os.Getenv(crashChild)
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	storage := testStorage
	storage.SegmentBytes = 1 << 20
	st, err := store.Open(context.Background(), store.Config{Dir: dir, Storage: storage, Logger: log, MemTableBytes: 8 << 20})
	if err != nil {
		log.Error("open", "error", err)
		return 1
	}
	ob, err := outbox.Open(st, outbox.Config{MaxBytes: 1 << 30, Logger: log})
	if err != nil {
		log.Error("open", "error", err)
		return 1
	}
	wake := make(chan Number, 10_000)
	q, err := Open(context.Background(), st, ob, Config{Now: time.Now, Policy: testPolicy, Logger: log, Strict: true, Notify: func(n Number) {
		select {
		case wake <- n:
		default:
		}
	}})
	if err != nil {
		log.Error("open", "error", err)
		return 1
	}
	var out sync.Mutex
	say := func(what string, id ids.Message) {
		out.Lock()
		defer out.Unlock()
		_, _ = fmt.Println(what, id) // a closed pipe: the parent is done with us
	}
	for i := range 8 {
		go crashAcceptor(q, st, i, say)
	}
	go crashOperator(q)
	for n := range wake {
		for {
			w, ok := takeLoaded(q, n, time.Now(), 10)
			if !ok {
				break
			}
			crashDeliver(q, w, say)
		}
	}
	return 0
}

func crashAcceptor(q *Queue, st *store.Store, i int, say func(string, ids.Message)) {
	text := []byte(strings.Repeat("x", 5000))
	for n := 0; ; n++ {
		now := time.Now()
		f := &fixture{clock: &clock{now: now}}
		env := f.envelope(fmt.Sprintf("u%d@d%d.example", n, n%7), fmt.Sprintf("v%d@d%d.example", n, i))
		body := st.NewBody()
		_, _ = body.Write(text) // small: cannot fail
		if n%50 == 49 {
			_, _ = body.Write(make([]byte, 100<<10)) // its error is kept for Seal
		}
		if body.Seal(0, [32]byte{}) != nil || q.Accept(context.Background(), env, body) != nil {
			return
		}
		say("A", env.ID)
	}
}

// crashOperator holds a domain and releases it again, without end.
func crashOperator(q *Queue) {
	for {
		id, err := q.PutHold(HoldRule{Match: Match{Domain: "d3.example"}, Owner: "operator", Cause: "a test"})
		if err != nil {
			return
		}
		<-time.After(20 * time.Millisecond)
		if q.RemoveHold(id, "operator") != nil {
			return
		}
		<-time.After(20 * time.Millisecond)
	}
}

func crashDeliver(q *Queue, w *Work, say func(string, ids.Message)) {
	a := &relay.Attempt{Message: w.Env.ID, MX: "mx.example.net", StartedAt: time.Now()}
	q.Begin(w, a, func(err error) {
		if err != nil {
			return
		}
		say("T", w.Env.ID)
		if rand.IntN(4) == 0 {
			q.Finish(w, a, all(w, relay.StateWaiting, outbox.Deferred, time.Now().Add(20*time.Millisecond)), nil, func(error) {})
			return
		}
		q.Finish(w, a, all(w, relay.StateDelivered, outbox.Delivered, time.Time{}), nil, func(err error) {
			if err == nil {
				for range w.Recipients {
					say("D", w.Env.ID)
				}
			}
		})
	})
}

func TestNothingAcknowledgedIsLostWhenKilled(t *testing.T) {
	dir := t.TempDir()
	accepted, tried, done := map[string]int{}, map[string]int{}, map[string]int{}
	for range 4 {
		runAndKill(t, dir, time.Duration(100+rand.IntN(400))*time.Millisecond, accepted, tried, done)
	}
	checkRecords(t, dir)
	f := newFixtureIn(t, dir)
	f.clock.now = time.Now()
	f.open()
	defer f.close()
	checkSurvivors(t, f, accepted, tried, done)
}

// checkRecords checks what a crash left, before anybody clears up.
func checkRecords(t *testing.T, dir string) {
	t.Helper()
	w := &ward{fixture: newFixtureIn(t, dir)}
	if count, found := w.fsck(false); !count.Clean {
		t.Errorf("after a crash the records disagree: %+v", found)
	}
}

// runAndKill runs the child, kills it some time after its first acknowledged
// message and adds up what it promised.
func runAndKill(t *testing.T, dir string, after time.Duration, accepted, tried, done map[string]int) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), crashChild+"="+dir)
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var killed *time.Timer
	lines := bufio.NewScanner(stdout)
	for lines.Scan() {
		if killed == nil {
			killed = time.AfterFunc(after, func() { _ = cmd.Process.Kill() })
		}
		what, id, ok := strings.Cut(lines.Text(), " ")
		if !ok || len(id) != 30 {
			continue // the line the kill cut short
		}
		switch what {
		case "A":
			accepted[id] = 2
		case "T":
			tried[id]++
		case "D":
			done[id]++
		}
	}
	_ = cmd.Wait() // it was killed
	if killed == nil {
		t.Fatal("the child accepted nothing")
	}
}

// checkSurvivors checks that every accepted message is either recorded as
// ended or in the queue with its body, and that what was being tried is in
// doubt and nothing else.
func checkSurvivors(t *testing.T, f *fixture, accepted, tried, done map[string]int) {
	t.Helper()
	t.Logf("%d accepted, %d tried, %d ended", len(accepted), len(tried), len(done))
	ended, deferred := map[string]int{}, map[string]int{}
	for after := uint64(0); ; {
		events, err := f.ob.Read(after, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		if len(events) == 0 {
			break
		}
		for _, e := range events {
			if e.Seq != after+1 {
				t.Fatalf("event %d follows %d", e.Seq, after)
			}
			after = e.Seq
			if e.Type == outbox.Deferred {
				deferred[e.Message.String()]++
			}
			if e.Type == outbox.Delivered || e.Type == outbox.Unknown {
				ended[e.Message.String()]++
			}
		}
	}
	for text, recipients := range accepted {
		id, err := ids.ParseMessage(text)
		if err != nil {
			t.Fatal(err)
		}
		if ended[text] == recipients {
			continue
		}
		info, err := f.q.Show(id)
		if err != nil {
			t.Errorf("%s was acknowledged and is lost: %v", text, err)
			continue
		}
		checkSurvivor(t, f, info, ended[text], tried[text]-deferred[text])
	}
	for text, n := range done {
		if ended[text] < n {
			t.Errorf("%s: %d ends were acknowledged, %d are recorded", text, n, ended[text])
		}
	}
}

func checkSurvivor(t *testing.T, f *fixture, info *MessageInfo, ended, tried int) {
	t.Helper()
	r, err := f.st.OpenBody(info.Env.Body)
	if err != nil {
		t.Errorf("%s: %v", info.Env.ID, err)
		return
	}
	if err := r.Verify(); err != nil {
		t.Errorf("%s: %v", info.Env.ID, err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	final := 0
	for _, s := range info.States {
		switch {
		case s.State.Final():
			final++
		case s.InDoubt > 0 && s.State != relay.StateWaiting && s.State != relay.StateHeld:
			t.Errorf("%s is in doubt and %v", info.Env.ID, s.State)
		}
	}
	if final != ended {
		t.Errorf("%s: %d recipients are final, %d ends are in the events", info.Env.ID, final, ended)
	}
	doubts := 0
	for _, s := range info.States {
		doubts += int(s.InDoubt)
	}
	if tried > 0 && doubts == 0 && ended == 0 {
		t.Errorf("%s was tried, its end is not known, and it is not in doubt", info.Env.ID)
	}
}

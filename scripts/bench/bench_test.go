package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

func testSink(t *testing.T) *sink {
	t.Helper()
	s, err := newSink("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.close)
	return s
}

// The client and the sink together: every message arrives once, and is booked
// under its number, whatever its size.
func TestClientToSink(t *testing.T) {
	s := testSink(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	k, err := dial(ctx, target{addr: s.listener.Addr().String()})
	if err != nil {
		t.Fatal(err)
	}
	defer k.close()
	for run, size := range []int{1 << 10, 100 << 10} {
		base := time.Now()
		a := s.expect(run+1, 300, base)
		out, err := k.send(ctx, run+1, 300, size, base)
		if err != nil {
			t.Fatal(err)
		}
		<-a.done
		r := evaluate(out, a, 300)
		if r.Lost != 0 || r.Duplicated != 0 || out.accepted != 300 || r.DeliveredPerS <= 0 || r.AcceptedPerS <= 0 {
			t.Errorf("%d bytes: %+v, %d accepted", size, r, out.accepted)
		}
	}
}

// Mail may come in pieces of any size, and with the next command behind it.
func TestSinkReadsPieces(t *testing.T) {
	s := testSink(t)
	message := "MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n"
	body := "Received: x\r\nX-Bench: 7-%d\r\n\r\nA text\r\n..\r\n.x\r\nends\r\n.\r\n"
	for _, piece := range []int{1, 2, 3, 7, 64, 1 << 20} {
		a := s.expect(7, 3, time.Now())
		conn, err := net.Dial("tcp", s.listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		text := "EHLO c\r\n" + message + fmt.Sprintf(body, 0) + message + fmt.Sprintf(body, 2) + message + fmt.Sprintf(body, 2) + "QUIT\r\n"
		go func() {
			for part := range slices.Chunk([]byte(text), piece) {
				if _, err := conn.Write(part); err != nil {
					return
				}
			}
		}()
		said, err := io.ReadAll(conn)
		if err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(string(said), "250 2.0.0 Taken"); n != 3 || !strings.HasSuffix(string(said), "221 2.0.0 Bye\r\n") {
			t.Errorf("pieces of %d: %d mails taken: %q", piece, n, said)
		}
		r := evaluate(&sent{at: []int64{1, 1, 1}}, a, 3)
		if r.Lost != 1 || r.Duplicated != 1 || a.copies[2] != 2 {
			t.Errorf("pieces of %d: %+v", piece, r)
		}
	}
	if n := s.foreign.Load(); n != 0 {
		t.Errorf("%d mails were not known", n)
	}
}

func TestEvaluate(t *testing.T) {
	a := &arrivals{at: make([]int64, 100)}
	s := &sent{at: make([]int64, 100)}
	for i := range 100 {
		s.at[i] = int64(time.Second) + int64(i)*int64(10*time.Millisecond)
		a.at[i] = s.at[i] + int64(i+1)*int64(time.Millisecond)
	}
	a.at[4] = s.at[4] - 1 // before it was accepted: no time at all
	r := evaluate(s, a, 100)
	if r.Lost != 0 || r.P50 != 51 || r.P99 != 100 || int(r.DeliveredPerS+0.5) != 92 || int(r.AcceptedPerS+0.5) != 50 {
		t.Errorf("%+v", r)
	}
}

func TestMediansAndRatios(t *testing.T) {
	o, err := parse([]string{"-systems", "relais,null,postfix", "-cases", "10k", "-rounds", "3"}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	r := &report{options: o}
	for i, cpu := range []float64{3, 1, 2} {
		r.add(&result{System: "relais", Case: "10k", CPU: cpu / 10, DeliveredPerS: 600, Duplicated: i})
		r.add(&result{System: "postfix", Case: "10k", CPU: cpu, DeliveredPerS: 100})
	}
	m := r.medians()
	if len(m) != 2 || m[0].System != "postfix" || m[1].CPU != 0.2 || m[1].Duplicated != 3 {
		t.Fatalf("%+v", m)
	}
	if q := r.ratios(m)["10k"]; q.DeliveredToPostfix != 6 || q.CPUOfPostfix != 10 || q.CPUToNull != 0 {
		t.Errorf("%+v", q)
	}
	if !r.good() {
		t.Error("a run without a loss is not good")
	}
	r.cells[3].Lost = 1
	if r.good() {
		t.Error("a run with a loss is good")
	}
	var out strings.Builder
	if err := r.print(&out); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	var cell map[string]any
	if err := json.Unmarshal([]byte(lines[len(lines)-2]), &cell); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"system", "case", "accepted_per_s", "delivered_per_s", "cpu_ms_per_msg", "rss_mib", "p50_ms", "p99_ms", "lost", "duplicated"} {
		if _, ok := cell[key]; !ok {
			t.Errorf("the line of a result lacks %s", key)
		}
	}
	if !strings.HasPrefix(lines[len(lines)-1], `{"ratios":{"10k":`) {
		t.Errorf("the last line is %q", lines[len(lines)-1])
	}
}

func TestReplaceSection(t *testing.T) {
	got, err := replaceSection("a\n"+docBegin+"\nold\n"+docEnd+"\nb\n", "new\n")
	if want := "a\n" + docBegin + "\nnew\n" + docEnd + "\nb\n"; err != nil || got != want {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := replaceSection("a\n"+docBegin+"\n", "new"); err == nil {
		t.Error("a section without an end was replaced")
	}
}

func TestParse(t *testing.T) {
	for _, args := range [][]string{{"-systems", "exim"}, {"-cases", "2k"}, {"-rounds", "0"}, {"-rounds", "many"}, {"-seconds", "601"}} {
		if _, err := parse(args, io.Discard); err == nil {
			t.Errorf("%v was taken", args)
		}
	}
	o, err := parse([]string{"-quick", "1", "-cases", "100k,1k", "-systems", "", "-rounds", ""}, io.Discard)
	if err != nil || o.rounds != 1 || o.seconds != quickSeconds || len(o.cases) != 2 || o.cases[0].name != "1k" || len(o.systems) != len(allSystems) {
		t.Errorf("%+v, %v", o, err)
	}
}

// The tree of this process holds this process and its children, and what they
// used.
func TestProcessTree(t *testing.T) {
	self := os.Getpid()
	if _, ok := tree([]int{self})[self]; !ok {
		t.Fatal("the tree lacks its root")
	}
	before := cpuTime([]int{self})
	for n := 0; cpuTime([]int{self}) < before+20*time.Millisecond; n++ {
		if n > 1e6 {
			t.Fatal("no CPU time is seen")
		}
	}
	if memory([]int{self}) < 1<<20 {
		t.Error("this process uses memory, none is seen")
	}
}

// Both signatures take time, and far less than a tenth of a second of it.
func TestBareSigning(t *testing.T) {
	d, err := bareSigning()
	if err != nil || d <= 0 || d > 100*time.Millisecond {
		t.Errorf("%v, %v", d, err)
	}
}

package engine

import (
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/policy"
)

// fullFS takes no bodies while it is told so.
type fullFS struct {
	store.FileSystem
	full   atomic.Bool
	failed atomic.Int64
}

type fullFile struct {
	store.File
	fs *fullFS
}

func (d *fullFS) Create(path string) (store.File, error) {
	f, err := d.FileSystem.Create(path)
	return &fullFile{f, d}, err
}

func (f *fullFile) WriteVectors(b [][]byte, off int64) error {
	if f.fs.full.Load() {
		f.fs.failed.Add(1)
		return unix.EIO
	}
	return f.File.WriteVectors(b, off)
}

// TestNoSecondCopyWhenTheReportFindsNoDisk: of an attempt that delivered to one
// recipient and failed for another the end cannot be stored, because the report
// finds no room. The attempt must not be repeated for that.
func TestNoSecondCopyWhenTheReportFindsNoDisk(t *testing.T) {
	disk := &fullFS{FileSystem: store.OS()}
	w := newWorld(t, nil, first)
	w.close()
	w.fs = disk
	w.open()
	w.run(time.Second)
	good, bad := w.at(lab.Google, 1, lab.Accept), w.at(lab.Google, 2, lab.Nobody)
	err := w.lab.SetBehaviour(lab.Google, lab.Behaviour{Answer: func(e lab.Event) lab.Answer {
		disk.full.Store(true) // from the attempt on
		return lab.Answer{}
	}})
	if err != nil {
		t.Fatal(err)
	}
	env := w.accept(func(e *relay.Envelope) { e.Recipients[1].Address.Domain = e.Recipients[0].Address.Domain }, good, bad)
	w.until("the report to fail", func() bool { return disk.failed.Load() > 0 })
	if err := w.lab.SetBehaviour(lab.Google, lab.Behaviour{}); err != nil {
		t.Fatal(err)
	}
	disk.full.Store(false)
	w.gone(env)
	if got := w.arrived(lab.Google); len(got) != 1 {
		t.Errorf("%d copies arrived", len(got))
	}
	w.event(env, outbox.Delivered)
	w.event(env, outbox.Bounced)
}

// TestUnconfirmedMailIsReported: a mail whose answer is lost ends as unknown,
// and its sender is told that its fate is not known.
func TestUnconfirmedMailIsReported(t *testing.T) {
	w := newWorld(t, nil, first)
	w.hostSender()
	w.view(func(d *policy.Document) { d.Queue.InDoubtRetries = 0 }, first)
	env := w.accept(nil, w.at(lab.Google, 0, lab.Late))
	w.event(env, outbox.Unknown)
	w.gone(env)
	w.until("the report", func() bool { return len(w.reports()) > 0 })
	text := w.reports()[0]
	for _, want := range []string{"Subject: Unconfirmed:", "Action: failed", "Status: 4.4.2", "may have been delivered or not"} {
		if !strings.Contains(strings.Join(strings.Fields(text), " "), want) {
			t.Errorf("the report lacks %q:\n%s", want, text)
		}
	}
}

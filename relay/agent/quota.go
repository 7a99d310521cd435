package agent

import (
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/wire"
)

// quota is the agent's part in what relays share: it carries messages of other
// parts of the relay to the cluster's leader, and the leader's to them.
type quota struct {
	mu       sync.Mutex
	handlers map[protoreflect.FullName]func(proto.Message)
	notices  []func(linked bool)
	session  *session // linked to a server that passes messages on; nil: none
}

// HandleQuota has a function called with each message from the leader that is of
// the type of example. It is called on the goroutine that reads the link, so it
// must be quick, and not wait for a link. Call it before Run, once for a type.
func (a *Agent) HandleQuota(example proto.Message, handle func(proto.Message)) {
	a.quota.mu.Lock()
	defer a.quota.mu.Unlock()
	name := example.ProtoReflect().Descriptor().FullName()
	if a.quota.handlers == nil {
		a.quota.handlers = make(map[protoreflect.FullName]func(proto.Message))
	}
	if a.quota.handlers[name] != nil {
		panic("agent: two handlers for " + string(name))
	}
	a.quota.handlers[name] = handle
}

// NoteQuotaLink has a function called when there is a link that carries messages
// to the leader, and when it is gone. It must be as quick as a handler. Call it
// before Run.
func (a *Agent) NoteQuotaLink(notice func(linked bool)) {
	a.quota.mu.Lock()
	defer a.quota.mu.Unlock()
	a.quota.notices = append(a.quota.notices, notice)
}

// SendQuota sends a message to the leader by way of the server that the relay is
// linked to. That it was sent does not mean that it arrives: the server may know
// no leader. It blocks while the link takes no bytes, at most until the link is
// given up. The error is fault.Unavailable without a link that carries it.
func (a *Agent) SendQuota(message proto.Message) error {
	const op = "agent.SendQuota"
	frame, err := wire.NewQuotaUp(message)
	if err != nil {
		return err
	}
	a.quota.mu.Lock()
	s := a.quota.session
	a.quota.mu.Unlock()
	if s == nil {
		return fault.New(fault.Unavailable, op, "there is no link to a server that passes messages to the leader")
	}
	if err := s.stream.SetWriteDeadline(time.Now().Add(maxReportInterval)); err != nil {
		return fault.Wrap(err, fault.Unavailable, op, "the link is gone")
	}
	return fault.Wrap(s.send(frame), fault.Unavailable, op, "the link is gone")
}

// quotaLink says that a session carries messages, or nil that none does any more.
func (a *Agent) quotaLink(s *session) {
	a.quota.mu.Lock()
	a.quota.session = s
	notices := a.quota.notices
	a.quota.mu.Unlock()
	for _, notice := range notices {
		notice(s != nil)
	}
}

// quotaDown hands a message of the leader to who handles its kind. One that
// nobody knows is from a newer server.
func (a *Agent) quotaDown(frame *wire.QuotaDown) error {
	message, err := frame.Message()
	if err != nil || message == nil {
		return err
	}
	a.quota.mu.Lock()
	handle := a.quota.handlers[message.ProtoReflect().Descriptor().FullName()]
	a.quota.mu.Unlock()
	if handle != nil {
		handle(message)
	}
	return nil
}

package smtpconn

import (
	"container/list"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"github.com/relais-mta/relais/shared/throttle"
)

// Commands are counted before they cost more than the line they stand in: of a
// session, of a client network, and of all. What breaks a rate is put off where
// SMTP has a reply for that, which costs the client one mail or recipient, and
// ends the session where it has none. Commands that are refused have a rate of
// their own, far lower: who errs that often is guessing or broken.

// maxIdleNetworks bounds the networks that are remembered without having a
// connection, about 250 octets each. One that is forgotten has its whole burst
// again.
const maxIdleNetworks = 1 << 15

// burstSeconds is how much of a rate of commands may come at once.
const burstSeconds = 5

// rates are limits as buckets take them.
type rates struct {
	total, network, session  throttle.Rate // commands
	totalErrors, networkErrs throttle.Rate
}

func (l *Limits) rates() rates {
	return rates{
		total:   commandRate(l.CommandsPerSecond),
		network: commandRate(l.CommandsPerSecondPerNetwork),
		session: commandRate(l.CommandsPerSecondPerSession),

		totalErrors: errorRate(l.ErrorsPerMinute),
		networkErrs: errorRate(l.ErrorsPerMinutePerNetwork),
	}
}

func commandRate(perSecond int) throttle.Rate {
	if perSecond <= 0 {
		return throttle.Rate{}
	}
	return mustRate(min(perSecond, throttle.MaxBurst/burstSeconds), time.Second, burstSeconds)
}

func errorRate(perMinute int) throttle.Rate {
	if perMinute <= 0 {
		return throttle.Rate{}
	}
	return mustRate(min(perMinute, throttle.MaxBurst), time.Minute, 1)
}

// mustRate makes a rate whose burst is so many times its limit; the callers keep
// within what throttle can count.
func mustRate(limit int, per time.Duration, times int) throttle.Rate {
	r, err := throttle.NewRate(limit, per, limit*times)
	if err != nil {
		panic(err)
	}
	return r
}

// counter counts the commands of one network, or of all clients.
type counter struct {
	mu       sync.Mutex
	commands throttle.Bucket
	errors   throttle.Bucket
}

// set gives the counter the rates of the policy in force.
func (c *counter) set(commands, errors throttle.Rate, now time.Time) {
	c.mu.Lock()
	c.commands.Set(commands, now)
	c.errors.Set(errors, now)
	c.mu.Unlock()
}

func (c *counter) command(now time.Time) (bool, time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.commands.Take(now, 1)
}

func (c *counter) failed(now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	ok, _ := c.errors.Take(now, 1)
	return ok
}

// room reports whether a command and an error would have room.
func (c *counter) room(now time.Time) (commands, errors bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	commands, _ = c.commands.Peek(now, 1)
	errors, _ = c.errors.Peek(now, 1)
	return commands, errors
}

// network is a client network that has a connection, or had one lately.
type network struct {
	counter
	key  netip.Prefix
	open int           // connections; guarded by Server.mu
	idle *list.Element // in networks.idle while open is 0; guarded by Server.mu
}

// networks finds the network of a client. Server.mu guards it. The zero value
// is ready.
type networks struct {
	known map[netip.Prefix]*network
	idle  list.List // of *network; the one that was left last stands in front
	most  int       // idle networks; 0: maxIdleNetworks
}

// join returns the network of a client that connects.
func (n *networks) join(ip netip.Addr, limits *Limits) *network {
	bits := limits.NetworkBitsIPv4
	if ip.Is6() {
		bits = limits.NetworkBitsIPv6
	}
	if bits == 0 {
		bits = ip.BitLen()
	}
	key, _ := ip.Prefix(bits) // invalid for an address that is none: those are counted together
	found := n.known[key]
	if found == nil {
		found = &network{key: key}
		if n.known == nil {
			n.known = make(map[netip.Prefix]*network)
		}
		n.known[key] = found
	}
	if found.idle != nil {
		n.idle.Remove(found.idle)
		found.idle = nil
	}
	found.open++
	return found
}

// leave notes that a connection of the network ended.
func (n *networks) leave(left *network) {
	if left.open--; left.open > 0 {
		return
	}
	left.idle = n.idle.PushFront(left)
	most := n.most
	if most == 0 {
		most = maxIdleNetworks
	}
	for n.idle.Len() > most {
		oldest := n.idle.Remove(n.idle.Back()).(*network)
		delete(n.known, oldest.key)
	}
}

// enter counts a connection for its network and says which rate is used up, "" if
// none is. s.mu is held.
func (s *Server) enter(c *Conn, now time.Time) string {
	c.network = s.networks.join(c.remote, &c.limits)
	r := c.limits.rates()
	s.total.set(r.total, r.totalErrors, now)
	c.network.set(r.network, r.networkErrs, now)
	c.commandBucket = throttle.NewBucket(r.session)
	// The errors of all are no reason to turn away a client that has made none.
	if commands, _ := s.total.room(now); !commands {
		return "command_rate"
	}
	switch commands, errors := c.network.room(now); {
	case !commands:
		return "command_rate_network"
	case !errors:
		return "error_rate_network"
	}
	return ""
}

// overRate takes a command from the buckets and says which rate it breaks, "" if
// none. The session comes first, so that what it breaks alone costs others
// nothing.
func (c *Conn) overRate(now time.Time) (reason string, wait time.Duration) {
	if ok, wait := c.commandBucket.Take(now, 1); !ok {
		return "command_rate_session", wait
	}
	if c.network != nil {
		if ok, wait := c.network.command(now); !ok {
			return "command_rate_network", wait
		}
	}
	if ok, wait := c.server.total.command(now); !ok {
		return "command_rate", wait
	}
	return "", 0
}

// erred counts a refused command.
func (c *Conn) erred() {
	c.errors++
	now := time.Now()
	if c.network != nil && !c.network.failed(now) {
		c.errorRate = "error_rate_network"
	} else if !c.server.total.failed(now) {
		c.errorRate = "error_rate"
	}
}

// rateTexts say which rate was broken, with its enhanced status code (RFC 3463
// sections 3.4 and 3.8: X.3.2, system not accepting messages; X.7.0).
var rateTexts = map[string]string{
	"command_rate":         "4.3.2 Too many commands from all clients",
	"command_rate_network": "4.7.0 Too many commands from your network",
	"command_rate_session": "4.7.0 Too many commands in a short time",
	"error_rate":           "4.3.2 Too many refused commands from all clients",
	"error_rate_network":   "4.7.0 Too many refused commands from your network",
}

// held deals with a command that breaks a rate. It returns true if the command
// was answered and the session goes on.
func (c *Conn) held(verb, reason string, wait time.Duration) (bool, error) {
	switch verb {
	case "DATA", "QUIT":
		return false, nil // MAIL and RCPT had room, and the end is what we want
	case "MAIL", "RCPT":
		seconds := max(1, int64((wait+time.Second-1)/time.Second))
		c.putOff = c.putOff || !c.inMail || verb == "RCPT"
		c.refuse(reason, "450 "+rateTexts[reason]+", try again in "+strconv.FormatInt(seconds, 10)+" s")
		return true, nil
	}
	return true, c.fail(reason, "421 "+rateTexts[reason]+", closing the connection")
}

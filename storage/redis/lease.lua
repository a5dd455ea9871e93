-- One round of one gateway process (a replica): it says that it lives, and asks who decides for each model.
--
-- KEYS[1]  when each replica was last heard     KEYS[2]  the last epoch of each lease     KEYS[3…]  leases
-- ARGV[1]  MessagePack: {replica, ttl, dead_after, lasts, wishes}, times in milliseconds; a wish for each lease:
--   0  hold it if it is free or ours     -1  only look     an epoch  give it up if it is ours of that epoch
--   {an epoch, a replica}  give it to that one, if it lives and the lease is ours of that epoch
-- `lasts` false: the replica leaves.
-- Answers MessagePack: {replicas, is_new, {epoch, holder, left}…}, `left` in milliseconds; a free lease is {0, '', 0}.
-- `is_new`: this server remembers no lease, also no old one.
--
-- Time is the server's own. An epoch is never used twice, also if the server has lost everything: it is at least the
-- time in milliseconds.

local HOLD = 0

local replica, ttl, dead_after, lasts, wishes = unpack(cmsgpack.unpack(ARGV[1]))
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

if lasts then
  redis.call('HSET', KEYS[1], replica, string.format('%.0f', now))
else
  redis.call('HDEL', KEYS[1], replica)
end
local replicas = {}
local heard = redis.call('HGETALL', KEYS[1])
for i = 1, #heard, 2 do
  if tonumber(heard[i + 1]) < now - dead_after then
    redis.call('HDEL', KEYS[1], heard[i])
  else
    replicas[#replicas + 1] = heard[i]
  end
end
redis.call('PEXPIRE', KEYS[1], 10 * dead_after)

local function grant(key, heir)
  local last = redis.call('HGET', KEYS[2], key)
  local epoch = math.max(tonumber(last or 0) + 1, now)
  redis.call('HSET', KEYS[2], key, string.format('%.0f', epoch))
  redis.call('SET', key, string.format('%.0f %s', epoch, heir), 'PX', ttl)
  return epoch, heir
end

local answer = {replicas, redis.call('EXISTS', KEYS[2]) == 0}
for i, wish in ipairs(wishes) do
  local key = KEYS[i + 2]
  local epoch, holder = 0, ''
  local held = redis.call('GET', key)
  if held then
    epoch, holder = string.match(held, '^(%d+) (.*)$')
    epoch = tonumber(epoch)
    if holder == replica and wish == HOLD then
      redis.call('PEXPIRE', key, ttl)
    elseif holder == replica and wish == epoch then
      redis.call('DEL', key)
      epoch, holder = 0, ''
    elseif type(wish) == 'table' and holder == replica and wish[1] == epoch
        and redis.call('HEXISTS', KEYS[1], wish[2]) == 1 then
      epoch, holder = grant(key, wish[2])
    end
  elseif wish == HOLD then
    epoch, holder = grant(key, replica)
  end
  answer[#answer + 1] = {epoch, holder, math.max(0, redis.call('PTTL', key))}
end
return cmsgpack.pack(answer)
